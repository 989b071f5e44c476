"""Two processes and accumulated passes are one process with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_model import AUXILIARY, batch, moe_model, train_tiny

import gated_attention
from gated_attention.train.auxiliary import AuxiliaryLosses

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    package = str(Path(gated_attention.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    run = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "found.pt")


def joined():
    model = moe_model()
    losses = AuxiliaryLosses(model, AUXILIARY)
    with losses.gather():
        loss = model(input_ids=batch(), labels=batch(), use_cache=False).loss
    loss = loss + losses.loss()
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "logged": losses.read(),
    }


@pytest.mark.parametrize("how", ["ddp-1", "ddp-2", "fsdp-1", "fsdp-2"])
def test_ranks_and_passes_are_one_joined_batch(found, how):
    expected, ranks = joined(), found[how]
    torch.testing.assert_close(ranks["loss"], expected["loss"], rtol=0, atol=1e-6)
    assert ranks["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(ranks["gradients"][name], gradient, rtol=0, atol=1e-6, msg=name)
    assert ranks["logged"]["expert_load"] == expected["logged"]["expert_load"]
    for name in ("load_balance_loss", "router_z_loss", "gate_open_share", "gate_penalty"):
        assert ranks["logged"][name] == pytest.approx(expected["logged"][name], abs=1e-6), name


def test_training_on_two_ranks_in_two_passes_is_training_in_one(found, tmp_path):
    one = train_tiny(tmp_path, batch_size=8)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(found["train"]["gradients"][name], gradient, rtol=0, atol=1e-6, msg=name)
    ranks, expected = found["train"]["lines"], one["lines"]
    assert [sorted(line) for line in ranks] == [sorted(line) for line in expected]
    for left, right in zip(ranks, expected, strict=True):
        for name in ("loss_nats", "val_loss_nats", "load_balance_loss", "router_z_loss", "gate_penalty"):
            assert left.get(name) == pytest.approx(right.get(name), abs=1e-5), name
