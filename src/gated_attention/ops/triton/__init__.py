"""Attention and the gate in portable Triton."""
