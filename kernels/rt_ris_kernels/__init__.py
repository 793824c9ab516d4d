"""CUDA kernels, their plugin and their readable references."""
