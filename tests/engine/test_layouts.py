"""Losses do not depend on how many processes share a model, or how; a run goes on on another number of them."""

import shutil

import numpy as np
import pytest
import torch
import worker
from engine_models import MIXTURE, PARALLEL, TRAINED, save
from engine_processes import finish, start


def losses_on(folder, num_processes):
    """Losses by variant, layout and number of processes."""
    finish(start(num_processes, folder / f"on-{num_processes}", worker.main, folder))
    found = torch.load(folder / f"found-{num_processes}.pt", weights_only=True)
    return {(*key, num_processes): values for key, values in found.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Losses by variant, layout and number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    tokens = np.memmap(folder / "tokens.npy", mode="w+", dtype=np.uint8, shape=(40_000,))
    tokens[:] = np.random.default_rng(0).integers(2, 64, 40_000)  # of few kinds: there is something to learn
    tokens.flush()
    for variant in TRAINED:
        save(variant, PARALLEL, folder / variant)
    losses = losses_on(folder, 2)
    for variant in TRAINED:
        for num in (1, 4):
            shutil.copytree(folder / f"{variant}-stopped", folder / f"{variant}-on-{num}")
    for num in (1, 4):
        losses |= losses_on(folder, num)
    return losses


@pytest.mark.parametrize(("layout", "num"), [("fsdp", 2), ("cp", 2), ("fsdp", 4), ("tp", 4)])
@pytest.mark.parametrize("variant", TRAINED)
def test_every_layout_has_the_losses_of_one_process(found, variant, layout, num):
    if (variant, layout) == (MIXTURE, "tp"):
        pytest.skip("experts are not trained with tensor parallelism; a run's file is refused")
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
