"""From findings to alarms that people act on: their life cycle, their delivery, and what a policy lets them start."""
