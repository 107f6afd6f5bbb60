"""The contract that both sides share, and nothing else.

What an agent receives: a *bundle* (`bundle`), cut into chunks by content (`chunking`), whose graph turns *views*
(`view_spec` has their parameters, `preprocess` makes them) into probabilities (`classifier`), whose fusion turns the
views of one item into a *verdict* (`fusion`) and whose *recipe* (`recipe`) turns the verdict into an outlet, by
thresholds that follow from prices and costs; `golden` views prove on every device that it computes the same, `profile`
is its reference. What may run is decided by signed metadata (`trust` accepts or refuses it by numbered rules,
`signed_set` is its form) and certificates (`identity`). What an agent sends back: *windows* of statistics that add
(`windows`, with `histogram`), in the `messages` and `topics` of the wire.

`errors` has the families of errors by recovery action, `config` reads strict settings, `files` writes atomically,
`versioning` distinguishes a newer document from a broken one, `connection` reads addresses and passwords of brokers,
`offline_export` names the files for a line without network, `statistics` has intervals, `token_bucket` limits rates,
`text` makes text safe to show: control characters visible, secrets in addresses hidden.

From pixels to verdict there is one implementation, here; training, evaluation, the agent's self-test and the line all
call it.

This package imports the standard library, numpy and msgspec; OpenCV in `preprocess`, ONNX Runtime in `classifier` (with
its telemetry off) and the signature library in `trust` alone. It contains no network, no database and no camera;
`service_notice` writes to the local socket of the service manager.
"""
