"""Counters that every real camera keeps."""

from dataclasses import dataclass


@dataclass(slots=True)
class CameraCounters:
    """Counts since the camera was opened."""

    frames: int = 0
    dropped: int = 0
    corrupt: int = 0
    """Frames that were damaged, or promised by a file and not there."""
    wrong_size: int = 0
    """Frames of another size than the line's geometry."""
    reopened: int = 0
    stale: int = 0
    """Old frames out of a driver's buffer that were thrown away."""
    times_mended: int = 0
    """Timestamps of a file that were doubled, ran back or were missing, and were replaced."""
