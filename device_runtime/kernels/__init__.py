"""The CUDA kernels: sources (.cu, .cuh), their table, and the calls that launch them."""
