"""Synthetic retrieval: where needles lie, what is asked, and scores against greedy decoding."""

import pytest
import torch

from gated_attention.evaluate.retrieval import KINDS, make_samples, score_samples

LENGTH = 400


BOS = 256


def encode(text, opens=False):
    return [BOS] * opens + list(text.encode())


def samples(kind="passkey", **changes):
    arguments = {"length": LENGTH, "depths": (0.0, 0.5, 1.0), "num_samples": 2, "seed": 3} | changes
    return list(make_samples(kind, encode, **arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", ["", "Some given text, with commas. " * 7])
def test_samples_fill_the_length_with_the_needle_at_its_depth(kind, filler):
    found = samples(kind, filler=filler)
    assert len(found) == 6
    for sample in found:
        text = sample.prompt + sample.answer
        assert LENGTH - 3 <= len(encode(text, opens=True)) <= LENGTH
        digits = sample.answer.strip()
        assert len(digits) == 5
        assert text.count(digits) == 2  # in the needle, and as the answer
        marker = "\nThe pass key is" if kind == "passkey" else "\nkey"
        first, last = text.find(marker), text.rfind(marker)
        if sample.depth == 0:
            assert first == 0
        if kind == "passkey" and sample.depth == 0.5:
            assert 0.3 < first / last < 0.6


def test_samples_depend_on_the_seed_only():
    assert samples() == samples()
    assert samples() != samples(seed=4)
    assert samples(depths=(0.5,)) == [one for one in samples() if one.depth == 0.5]


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="unknown retrieval 'pass'; choose from passkey, key-value"):
        samples("pass")
    with pytest.raises(ValueError, match="depth is 2; it must be at least 0 and at most 1"):
        samples(depths=(2,))
    with pytest.raises(ValueError, match="a passkey question leaves no room for filler in 20 tokens"):
        samples(length=20)


def test_scores_equal_greedy_decoding_and_prefixes(gated, naive_losses):
    found = samples(length=90, depths=(0.0, 1.0))
    scores = score_samples(gated, encode, found)
    assert [(one.length, one.depth, one.num_samples) for one in scores] == [(90, 0.0, 2), (90, 1.0, 2)]
    for score in scores:
        losses, exact = [], []
        for sample in (one for one in found if one.depth == score.depth):
            prompt, answer = encode(sample.prompt, opens=True), encode(sample.answer)
            losses.append(sum(naive_losses(gated, prompt + answer)[len(prompt) - 1 :]) / len(answer))
            written = gated.generate(
                torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, pad_token_id=0, eos_token_id=None
            )
            exact.append(written[0, len(prompt) :].tolist() == answer)
        assert score.loss_nats == pytest.approx(sum(losses) / 2, abs=1e-8)
        assert score.exact_match == sum(exact) / 2


class Oracle(torch.nn.Module):
    """Foresees every token."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        following = torch.roll(input_ids, -1, 1)
        following[:, -1] = 0
        logits = torch.nn.functional.one_hot(following, 257).double() * 50
        return type("Output", (), {"logits": logits})


def test_an_oracle_matches_exactly():
    (score,) = score_samples(Oracle(), encode, samples(depths=(0.5,)))
    assert score.exact_match == 1
    assert score.loss_nats < 1e-9
