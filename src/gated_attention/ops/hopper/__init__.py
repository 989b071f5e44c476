"""Attention with the gate in its kernels, for GPUs of compute capability 9, in Gluon."""
