"""Compilation of kernels for GPUs that are not there."""

import pytest
from ptxas_log import listening


@pytest.fixture
def assemble(monkeypatch):
    """What ptxas says of a kernel, and how much shared memory it takes."""
    import triton
    from absent import Absent

    def assemble(capability, kernel, *arguments, **options):
        monkeypatch.setattr(triton.runtime.driver, "_active", Absent(capability))
        with listening() as said:
            compiled = kernel.warmup(*arguments, grid=(1,), **options)
        return said.getvalue(), compiled.metadata.shared

    return assemble
