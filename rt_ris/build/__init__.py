"""From a bundle's graphs to engines, on any machine that has the engine's builder.

Runs where neither torch nor onnx is. The builder works in a child process (``child``), since it
ends its process on some faults and on an exhausted memory; ``engines`` starts it, writes what it
made beside a record of what it is, and says what was not verified.
"""
