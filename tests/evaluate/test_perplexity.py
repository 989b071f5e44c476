"""Loss of documents against prefixes read one at a time, and averages against their formulas."""

from math import exp, log, sqrt

import numpy as np
import pytest

from gated_attention.evaluate.perplexity import (
    Document,
    DocumentLoss,
    average_domains,
    document_losses,
    domain_loss,
    windows,
)

CONTEXT, STRIDE = 8, 3


def documents():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 5, 8, 9, 21]
    return [Document(tuple(rng.integers(0, 257, n).tolist()), tuple(rng.integers(0, 4, n).tolist())) for n in sizes]


def naive(model, document, mode, naive_losses):
    ids = document.ids
    if mode == "start":
        losses = naive_losses(model, ids[:CONTEXT])
        return sum(losses), len(losses), sum(document.num_bytes[1:CONTEXT])
    nats, scored, start = 0.0, 1, 0
    while scored < len(ids):
        stop = min(len(ids), start + CONTEXT)
        nats += sum(naive_losses(model, ids[start:stop])[scored - start - 1 :])
        scored, start = stop, start + STRIDE
    return nats, len(ids) - 1, sum(document.num_bytes[1:])


@pytest.mark.parametrize("mode", ["start", "sliding"])
def test_losses_equal_prefixes_read_one_at_a_time(model, mode, naive_losses):
    found = document_losses(model, documents(), mode=mode, context=CONTEXT, stride=STRIDE, batch_tokens=24)
    for document, loss in zip(documents(), found, strict=True):
        nats, count, num_bytes = naive(model, document, mode, naive_losses)
        assert loss.nats == pytest.approx(nats, abs=1e-8)
        assert (loss.num_tokens, loss.num_bytes) == (count, num_bytes)


def test_windows_score_every_token_once_with_enough_before_it():
    for n in range(2, 60):
        seen = []
        for start, stop, scored in windows(n, "sliding", CONTEXT, STRIDE):
            assert stop - start <= CONTEXT
            assert scored - start >= min(scored, CONTEXT - STRIDE)
            seen += range(scored, stop)
        assert seen == list(range(1, n))


@pytest.mark.parametrize("stride", [0, CONTEXT, CONTEXT + 1])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}; it must be at least 1 and below the context, 8"):
        list(windows(20, "sliding", CONTEXT, stride))


def test_averages_follow_their_formulas():
    losses = [DocumentLoss(10.0, 5, 20), DocumentLoss(9.0, 3, 10), DocumentLoss(4.0, 4, 16), DocumentLoss(7.0, 5, 18)]
    found = average_domains(losses, ["b", "b", "a", "a"])
    a, b = found.domains["a"], found.domains["b"]
    assert list(found.domains) == ["a", "b"]
    assert b.loss_nats == pytest.approx(19 / 8)
    assert b.bits_per_byte == pytest.approx(19 / log(2) / 30)
    assert b.standard_error == pytest.approx(sqrt(2 * ((10 - 5 * 19 / 8) ** 2 + (9 - 3 * 19 / 8) ** 2)) / 8)
    assert found.mean_perplexity == pytest.approx((exp(19 / 8) + exp(11 / 9)) / 2)
    assert found.mean_loss_nats == pytest.approx((19 / 8 + 11 / 9) / 2)
    assert found.standard_error == pytest.approx(sqrt(a.standard_error**2 + b.standard_error**2) / 2)


def test_one_document_has_no_spread_and_none_is_refused():
    assert domain_loss([DocumentLoss(10.0, 5, 20)]).standard_error is None
    with pytest.raises(ValueError, match="no document is long enough to score a token"):
        domain_loss([DocumentLoss(0.0, 0, 0)])


def test_the_model_is_left_in_its_mode(gated):
    gated.train()
    document_losses(gated, documents(), mode="start", context=CONTEXT, stride=STRIDE)
    assert gated.training
