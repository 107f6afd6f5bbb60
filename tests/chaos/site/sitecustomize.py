"""A wrong clock for a child process: shifts what `time` says of the date, never the monotonic clock."""

import os
import time

_SHIFT_S = float(os.environ.get("SORTLINE_CHAOS_CLOCK_S", "0") or 0)
if _SHIFT_S:
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _SHIFT_S
    time.time_ns = lambda: _time_ns() + int(_SHIFT_S * 1e9)
