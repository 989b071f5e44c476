"""The Triton kernels around a stock attention, run in Triton's interpreter against their plain PyTorch twins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compute_what_plain_pytorch_does():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_gate_check.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
