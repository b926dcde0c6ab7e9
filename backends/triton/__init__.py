"""Generated Triton kernels for CUDA devices; importable, and checked, without a GPU and without triton."""
