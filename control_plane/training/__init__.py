"""Training: from labelled photographs to a bundle.

`patch_features` learns a dictionary of patches and computes it by an ONNX graph, in training as on the line;
`colour_features` measures large soft areas and `scalar_features` what no view shows, such as weight; `augment` varies
views; `head` fits and calibrates the classifier on top; `ensemble` gives a member a vote only where it helps on
unseen items; `fusion` learns how views of an item are fused; `onnx_writer` has the primitives of a graph;
`onnx_graph` builds the model's one graph from features and head and checks that it computes what scikit-learn
computed; `quantise` converts it to eight bits. `cross_validation` fits every fold and the whole on all cores;
`pipeline` runs all steps in order and writes the bundle with its `card`.

Models trained elsewhere become bundles in `foreign`.
"""
