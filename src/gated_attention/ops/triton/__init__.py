"""Attention and the gate in Triton, for every GPU that it knows."""
