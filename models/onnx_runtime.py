"""Imports ONNX Runtime with its telemetry off; every other module takes it from here.

The official Linux wheels from 1.29 on report to their vendor unless told otherwise: at its first use the library writes
a device id and a database of queued events under the user's cache folder, and a thread of its own resolves and calls a
collector. `ORT_DISABLE_TELEMETRY=1` is the full opt-out, read once when the library initialises; neither its API nor a
later change of the environment undoes what has been sent before. The variable is therefore set here, before the import,
and the processes that this one starts inherit it.
"""

import os

TELEMETRY_OFF = ("ORT_DISABLE_TELEMETRY", "1")
os.environ[TELEMETRY_OFF[0]] = TELEMETRY_OFF[1]

import onnxruntime as ort  # noqa: E402

__all__ = ["TELEMETRY_OFF", "ort"]
