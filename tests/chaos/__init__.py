"""Chaos: everything dies, loses and lies at random, and at the end the books must balance."""
