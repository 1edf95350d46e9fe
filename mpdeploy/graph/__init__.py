"""ONNX graphs: export, the N:M manifest of their weights, static int8, and what a file holds.

Only `graph.export` and `graph.simplify` need torch or onnxscript: a host that merely builds engines imports the rest.
"""
