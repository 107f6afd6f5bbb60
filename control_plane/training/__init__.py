"""From labelled photographs to a bundle.

`datasets` reads a folder and refuses what cannot be learnt from; `splits` keeps all views of an item on one side;
`features` learns a dictionary of patches and computes it by an ONNX graph, in training as on the line; `head` fits
and calibrates the classifier on top; `graph` merges both into one model and proves that it computes what
scikit-learn computed; `metrics` gives figures with intervals over items; `pipeline` does all of it in order and writes
the bundle with its `card`; `evaluation` judges a folder as an agent would; `importing` wraps models trained elsewhere.
"""
