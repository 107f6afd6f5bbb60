"""Models trained elsewhere, as bundles.

`foreign_model` reads what a file contains: inputs, output, class names, weights beside it. `onnx_import` wraps the
graph, measures it on a labelled folder and writes the bundle. `import_checks` refuses answers that contradict the
folder, and names the reason by trying the usual ones.
"""
