"""Kernels without a GPU: compiled for one that is not there, or run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def run_interpreted():
    """Run a script of this folder with the interpreter, which is switched on before Triton is imported."""

    def run(script, *words):
        command = [sys.executable, str(Path(__file__).with_name(script)), *words]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    return run
