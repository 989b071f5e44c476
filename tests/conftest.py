"""What every test stands on: checked shapes, a fixed seed, one thread, no network, no GPU unless marked."""

import functools
import gc
import importlib.util
import os
import random
import re
import socket
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

# Hugging Face's libraries read these when they are first imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def modules_with_shapes():
    """The modules whose shapes are checked; not those with kernels, whose compilers look names up where they stand."""
    [root] = importlib.util.find_spec("gated_attention").submodule_search_locations
    for part in ("ops", "nn", "analysis"):
        for path in sorted(Path(root, part).rglob("*.py")):
            if path.stem != "__init__" and not re.search(r"@(triton|gluon)\.jit", path.read_text(encoding="utf-8")):
                yield ".".join(("gated_attention", *path.relative_to(root).with_suffix("").parts))


# Only modules that are imported after this line are checked, so no test file may import them earlier.
jaxtyping.install_import_hook(list(modules_with_shapes()), "beartype.beartype")
torch.set_num_threads(1)  # as many processes run as there are cores, and threads that wait for one spin


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """What earlier files left is not looked through again: Trainer collects garbage at the start of every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests use no network, refused {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture
def one_thread():
    """For many small models: two threads wait for each other in matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_shape_checks():
    """Signatures unchecked, for what users meet and the checks would meet first: wrong arguments, torch.compile."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compile_whole(without_shape_checks):
    """`torch.compile` that refuses graph breaks, with nothing compiled before."""
    torch.compiler.reset()
    yield functools.partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


@pytest.fixture
def assert_within_twice():
    """The error rule for low precision: no worse than twice the plain PyTorch expression in the same dtype."""

    def check(name, out, plain, exact, atol):
        assert out.isfinite().equal(exact.isfinite()), (
            f"{name} is finite where it should not be, or not where it should"
        )
        finite = exact.isfinite()
        error, allowed = ((x.double() - exact)[finite].abs().max().item() for x in (out, plain))
        assert error <= 2 * allowed + atol, f"{name} is off by {error:.2e}, plain PyTorch by {allowed:.2e}"

    return check
