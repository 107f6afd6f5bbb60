"""The contract both sides share, and nothing else.

What an agent receives: a *bundle* (`bundle`), whose graph turns *views* (`preprocess`) into probabilities
(`classifier`), whose fusion turns the views of one item into a *verdict* (`fusion`) and whose *recipe* (`recipe`)
turns the verdict into an outlet. What it sends back: *windows* of statistics that add (`windows`), wrapped in the
messages and topics of `messages`. Whatever goes wrong is one of the families in `errors`.

From pixels to verdict there is one implementation, here; training, evaluation, the agent's self-test and the line
all call it, and golden views in every bundle prove on the device that it computes the same.

This package imports the standard library, numpy and msgspec; OpenCV in `preprocess` and ONNX Runtime in
`onnx_runtime` alone (with its telemetry off). It knows no network, no database, no camera.
"""
