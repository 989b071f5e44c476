"""Every step trains, the last at the lowest rate; a run reads whole passes, and every sequence equally often."""

from itertools import pairwise

import pytest
import torch

from gated_attention.train.schedule import Passes, rate_factor
from gated_attention.train.trainer import TrainConfig


def rates(steps, warmup):
    config = TrainConfig(steps=steps, batch_size=1, learning_rate=1.0, warmup=warmup)
    return [
        rate_factor(step, steps=steps, warmup_steps=config.warmup_steps, minimum=config.min_learning_rate)
        for step in range(steps)
    ]


def test_the_rate_rises_from_the_first_step_on_and_ends_at_its_minimum():
    found = rates(100, 0.1)
    assert found[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert found[54] == pytest.approx((1 + 0.015) / 2)  # half of the cosine
    assert found[-1] == pytest.approx(0.015)
    assert all(left > right for left, right in pairwise(found[9:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.02), (1, 0.0), (2, 0.5), (3, 1.0), (7, 0.0)])
def test_short_runs_reach_the_peak_and_no_step_is_idle(steps, warmup):
    found = rates(steps, warmup)
    assert max(found) == 1.0
    assert min(found) > 0


@pytest.mark.parametrize(("num_sequences", "num_samples"), [(5, 12), (5, 5), (5, 3), (1, 4), (7, 21)])
def test_a_sequence_is_read_again_only_when_all_have_been(num_sequences, num_samples):
    drawn = list(Passes(range(num_sequences), num_samples, seed=0))
    assert len(drawn) == num_samples == len(Passes(range(num_sequences), num_samples, seed=0))
    for start in range(0, num_samples, num_sequences):
        part = drawn[start : start + num_sequences]
        assert len(set(part)) == len(part)


def test_the_order_changes_with_every_round_and_with_the_seed_and_repeats():
    first, again, other = (list(Passes(range(50), 100, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first[:50] != first[50:]
    assert first[50:] != other[:50]
    assert first[:50] == torch.randperm(50, generator=torch.Generator().manual_seed(1)).tolist()
