"""S2O itself: rank, select, attend over a paged KV cache. Torch and Triton, never vLLM."""
