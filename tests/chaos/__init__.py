"""Chaos: random faults in every part of the system, after which every record must be accounted for."""
