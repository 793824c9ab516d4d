"""Engines from a bundle's graphs, and the proof that a machine computes what PyTorch computed.

Runs where neither torch nor onnx is. The builder works in a child process (``child``), since it
ends its process on some faults and on an exhausted memory; ``engines`` starts it, writes what it
made beside a record of what it is, and says what was not verified. ``replay`` runs a bundle's
golden vectors on whatever is here, by the ``limits`` that the exporter's gate has too.
"""
