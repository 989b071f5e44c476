"""Two processes, by tensor parallelism or FSDP2, compute the logits and the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_blocks import BLOCKS, config_of, ids

import gated_attention
from gated_attention.models.build import build_model

WORKER = Path(__file__).with_name("parallel_worker.py")
FEW = ["sdpa headwise", "sdpa head-shared", "learned sink", "sdpa rms_norm, gated", "switch, 2 of 4", "added to Llama"]


def run_in_two_processes(folder, names):
    for name in names:
        build_model(config_of(name), seed=0).save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    paths = [str(Path(gated_attention.__file__).parents[1]), str(WORKER.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [*command, str(folder), *names], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "found.pt")


def check(found, name):
    assert "error" not in found, found.get("error")
    model = build_model(config_of(name), seed=0)
    model.set_experts_implementation("batched_mm")
    output = model(ids(), labels=ids())
    output.loss.backward()
    for key in ("no_grad", "logits"):
        torch.testing.assert_close(found[key], output.logits, rtol=1e-4, atol=1e-5)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found["gradients"].keys() == expected.keys()
    for key, gradient in expected.items():  # FSDP's mean over ranks is that of equal batches
        torch.testing.assert_close(
            found["gradients"][key], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert not found.get("said")  # of rules that match no layer


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run_in_two_processes(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run_in_two_processes(tmp_path_factory.mktemp("every"), list(BLOCKS))


@pytest.mark.parametrize("how", ["tp", "fsdp"])
@pytest.mark.parametrize("name", FEW)
def test_two_processes_are_one(few, name, how):
    check(few[name, how], name)


@pytest.mark.trust
@pytest.mark.parametrize("how", ["tp", "fsdp"])
@pytest.mark.parametrize("name", BLOCKS)
def test_two_processes_are_one_for_every_block(every, name, how):
    check(every[name, how], name)
