"""Quality harness: the error of sparse attention on real queries, keys and values."""
