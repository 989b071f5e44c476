"""Loss by length and position against prefixes read one at a time."""

import numpy as np
import pytest
import torch

from gated_attention.evaluate.length import damage_inside, length_losses
from gated_attention.evaluate.rope import Rope, overridden

TRAINED, LONGEST = 8, 24


@pytest.fixture
def passages():
    return torch.randint(0, 257, (3, LONGEST))


def test_targets_are_the_same_tokens_at_every_length(model, passages, naive_losses):
    found = length_losses(model, passages, TRAINED, [8, 16, 24], batch_tokens=40)
    for one in found:
        naive = np.array([naive_losses(model, row[-one.length :].tolist()) for row in passages])
        np.testing.assert_allclose(one.targets, naive[:, -TRAINED // 2 :].mean(1), atol=1e-8)
        assert one.loss_nats == pytest.approx(naive[:, -TRAINED // 2 :].mean(), abs=1e-8)
        assert one.standard_error == pytest.approx(naive[:, -TRAINED // 2 :].mean(1).std(ddof=1) / 3**0.5, abs=1e-8)
        for start, value in zip(one.starts, one.buckets, strict=True):
            at = slice(max(0, start - 1), start + 1)  # position p is column p - 1, a bucket is two positions wide
            assert value == pytest.approx(naive[:, at].mean(), abs=1e-8)
        assert one.starts == tuple(range(0, one.length, 2))


def test_damage_is_the_paired_difference_inside_the_trained_length(gated, passages):
    (plain,) = length_losses(gated, passages, TRAINED, [TRAINED])
    with overridden(gated, Rope(yarn=4.0), TRAINED):
        (changed,) = length_losses(gated, passages, TRAINED, [TRAINED])
    damage = damage_inside(plain, changed)
    difference = changed.targets - plain.targets
    assert damage.nats == pytest.approx(difference.mean())
    assert damage.nats != 0
    assert damage.standard_error == pytest.approx(difference.std(ddof=1) / 3**0.5)
