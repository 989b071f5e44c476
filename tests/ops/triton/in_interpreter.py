"""Scripts that run kernels in Triton's interpreter, which is switched on before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(script, *words):
    """Run a script of this folder; fail with what it says."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
