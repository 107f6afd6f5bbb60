"""Firing of ejectors by belt position, and the check whether a shot hit.

`queue` fires each shot when the encoder says that its item is in front of the ejector; `confirmation` compares shots
with what photo-eyes see, and learns how long an ejector takes. An item that slips on the belt behind the camera is
noticed only there, as a miss.
"""
