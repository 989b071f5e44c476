"""What ptxas says while Triton compiles; Triton has two of them, and options for them that change with its version."""

import contextlib
import io
import re


@contextlib.contextmanager
def listening():
    from triton import knobs

    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = True  # what is taken from the cache is silent
        knobs.nvidia.dump_ptxas_log = True
        yield said


def spilled(said):
    """Bytes of (stores, loads)."""
    return tuple(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()))
