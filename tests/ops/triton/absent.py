"""GPUs that kernels are compiled for, what they have, and what is asked of the code."""

import triton
from ptxas_log import spilled
from triton.backends.compiler import GPUTarget

SPILLED = 0 if triton.__version__.startswith(("3.6.", "3.7.")) else 600  # bytes of stores and loads in the code
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # what 8.6 and 8.9 have of it is less than what 8.0 has


class Absent:
    """A GPU that kernels are compiled for and never run on."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def assert_fast(capability, said, shared, bytes_spilled=SPILLED):
    """A spill, or products in series, halves the speed and shows nowhere else."""
    assert sum(spilled(said)) <= bytes_spilled, said
    assert "serializ" not in said
    assert shared <= SHARED_MEMORY[capability]
