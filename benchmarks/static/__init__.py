"""What the CUDA kernels execute, move and occupy, without a GPU: ``python -m benchmarks.static --help``."""
