"""When an ejector fires, and whether it hit.

`queue` fires each shot when its item is in front of the ejector; `confirmation` learns from photo-eyes which shots
arrived and how long an ejector takes.
"""
