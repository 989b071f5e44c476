"""Losses do not depend on how many processes share a model, or how; a run goes on on another number of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import PARALLEL, TRAINED, save

import gated_attention

WORKER = Path(__file__).with_name("worker.py")


def start(folder, num_processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    paths = [str(Path(gated_attention.__file__).parents[1]), str(WORKER.parent)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    run = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return torch.load(folder / f"found-{num_processes}.pt", weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Losses by variant, layout and number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    tokens = np.memmap(folder / "tokens.npy", mode="w+", dtype=np.uint8, shape=(40_000,))
    tokens[:] = np.random.default_rng(0).integers(2, 64, 40_000)  # of few kinds: there is something to learn
    tokens.flush()
    for variant in TRAINED:
        save(variant, PARALLEL, folder / variant)
    losses = {(*key, 2): values for key, values in start(folder, 2).items()}
    for variant in TRAINED:
        for num in (1, 4):
            shutil.copytree(folder / f"{variant}-stopped", folder / f"{variant}-on-{num}")
    for num in (1, 4):
        losses |= {(*key, num): values for key, values in start(folder, num).items()}
    return losses


@pytest.mark.parametrize(("layout", "num"), [("fsdp", 2), ("cp", 2), ("fsdp", 4), ("tp", 4)])
@pytest.mark.parametrize("variant", TRAINED)
def test_every_layout_has_the_losses_of_one_process(found, variant, layout, num):
    expected = found[variant, "fsdp", 1]
    assert list(expected) == list(range(1, 21))
    assert expected[20] < expected[1] - 0.2
    assert found[variant, layout, num] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("variant", TRAINED)
def test_a_run_stopped_on_two_processes_goes_on_on_another_number(found, variant, num):
    uninterrupted = found[variant, "fsdp", 2]
    assert found[variant, "stopped", 2] == pytest.approx({step: uninterrupted[step] for step in range(1, 6)}, abs=1e-6)
    assert found[variant, "resumed", num] == pytest.approx({step: uninterrupted[step] for step in (6, 7, 8)}, abs=1e-4)
