"""The six axes of a sparse-attention method, and the plan they end in."""
