"""The backend for NVIDIA GPUs: int4 weights, paged KV cache, one CUDA graph per decode step."""
