"""Plans against what PyTorch counts on its meta device; the examples. Needs no OLMo-core."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gated_attention.engine.run.plan import plan_run
from gated_attention.engine.run.plan_text import plan_lines
from gated_attention.engine.run.run_file import read_run
from gated_attention.models import GatedQwen3ForCausalLM, GatedQwen3MoeForCausalLM
from gated_attention.models.configuration_gated_qwen3 import make_config

RUNS = Path(__file__).parents[2] / "examples" / "train"
EXPECTED = {
    "laptop": (919_040, 240 * 2048, 1),
    "laptop-moe": (1_553_024, 240 * 2048, 1),
    "one-gpu": (97_539_840, 6000 * 32_768, 1),
    "eight-gpus": (1_721_754_624, 34e9, 8),
    "sixty-four-gpus": (1_715_369_472, 400e9, 64),
    "paper-1.7b-28l": (1_728_177_152, 3.5e12, 64),
    "paper-1.7b-48l": (1_715_369_472, 1e12, 64),
    "paper-15a2b": (15_778_553_856, 100_000 * 1024 * 4096, 64),
}
"""Parameters, tokens and GPUs."""


def test_every_example_is_named_here():
    assert {path.stem for path in RUNS.glob("*.toml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_example_is_read_and_fits_its_gpus(name):
    run = read_run(RUNS / f"{name}.toml")
    plan = plan_run(run)
    parameters, tokens, gpus = EXPECTED[name]
    assert (plan.parameters, plan.gpus) == (parameters, gpus)
    assert plan.tokens == pytest.approx(tokens, rel=1e-3)
    assert plan.fits
    lines = "\n".join(plan_lines(run, plan))
    assert "does not fit" not in lines
    assert f"{run.steps:,} steps" in lines


def test_the_papers_settings_are_the_published_ones():
    dense, deep, mixture = (read_run(RUNS / f"paper-{name}.toml") for name in ("1.7b-28l", "1.7b-48l", "15a2b"))
    assert (dense.learning_rate, dense.file.batch.sequences, dense.context) == (4.5e-3, 2048, 4096)
    assert (deep.learning_rate, deep.file.batch.sequences, deep.context) == (8e-3, 4096, 4096)
    assert (mixture.learning_rate, mixture.file.batch.sequences, mixture.steps) == (2e-3, 1024, 100_000)
    assert mixture.warmup_steps == 1000
    for run in (dense, deep, mixture):
        assert run.learning_rate * run.file.schedule.min_learning_rate == pytest.approx(3e-5, rel=1e-3)


def counted_flops(size, block, context):
    """Per token, by PyTorch's counter on the meta device; its attention is not causal, so half of it is taken."""
    config = make_config(size, block, attn_implementation="sdpa")
    with torch.device("meta"):
        model = GatedQwen3ForCausalLM(config)
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        mask = {"full_attention": None}  # whole and causal; making one would read values, which meta tensors lack
        model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in found.items() if "attention" in str(op) or "bmm" in str(op))
    return (sum(found.values()) - attention / 2) / context


def test_the_plan_of_15a2b_on_3_5t_tokens_agrees_with_a_meta_device():
    run = read_run(RUNS / "paper-15a2b.toml", ["schedule.tokens=3.5e12"])
    plan = plan_run(run)
    with torch.device("meta"):
        model = GatedQwen3MoeForCausalLM(make_config(run.size, run.block))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    shard = 16 * numbers / (64 / 4)  # weights, gradients and two moments, float32, in each replica's share
    assert plan.parameters == numbers
    assert plan.memory.states == pytest.approx(shard, rel=0.1)
    size = run.size
    router = size.num_hidden_layers * size.hidden_size * size.num_experts
    active = replace(size, num_experts=0, intermediate_size=size.num_experts_per_tok * size.intermediate_size)
    counted = counted_flops(active, run.block, run.context) + 6 * router
    assert plan.flops.total == pytest.approx(counted, rel=0.1)
    assert plan.total_flops == pytest.approx(counted * 3.5e12, rel=0.1)


def test_flops_of_a_dense_model_agree_with_a_meta_device():
    run = read_run(RUNS / "one-gpu.toml")
    assert plan_run(run).flops.total == pytest.approx(counted_flops(run.size, run.block, run.context), rel=0.01)


def test_memory_is_shared_as_the_layout_says():
    def memory(*changes):
        return plan_run(read_run(RUNS / "sixty-four-gpus.toml", changes)).memory

    base = memory()
    assert memory("parallel.replicas=1").states == pytest.approx(base.states / 8)
    assert memory("parallel.replicas=2").states == pytest.approx(base.states / 4)
    assert memory("parallel.tensor=2").activations < 0.6 * base.activations
    assert memory("parallel.context=2").activations == pytest.approx(base.activations / 2)
    assert memory("precision.recompute=none").activations > 10 * base.activations
    assert memory("batch.micro=4").logits == 2 * base.logits


def test_what_does_not_fit_says_what_would():
    run = read_run(RUNS / "paper-15a2b.toml", ["precision.recompute=none", "batch.micro=8"])
    assert plan_lines(run, plan_run(run))[-1] == (
        "this does not fit: choose a smaller batch.micro, precision.recompute 'full', fewer parallel.replicas, "
        "more GPUs"
    )


def test_hours_and_cost_follow_from_the_stated_mfu():
    half = plan_run(read_run(RUNS / "laptop.toml", ["cost.mfu=0.2", "cost.dollars_per_gpu_hour=4.0"]))
    full = plan_run(read_run(RUNS / "laptop.toml"))
    assert half.gpu_hours == pytest.approx(2 * full.gpu_hours)
    assert full.gpu_hours == pytest.approx(full.total_flops / (989e12 * 0.4) / 3600)
    assert half.dollars == pytest.approx(4 * half.gpu_hours)
    with pytest.raises(ValueError, match=r"unknown cost.gpu 'abacus'; choose from A100"):
        plan_run(read_run(RUNS / "laptop.toml", ["cost.gpu=abacus"]))
