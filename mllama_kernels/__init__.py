"""mllama_kernels."""
