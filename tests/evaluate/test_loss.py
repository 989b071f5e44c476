import math

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from gated_attention.evaluate import HeldOutLoss, held_out_loss
from gated_attention.evaluate.loss import frequency_loss


class TableModel(nn.Module):
    """Logits are rows of a table, so that losses can be written down."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size))

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return CausalLMOutput(logits=self.table[input_ids])


def test_mean_over_predictions_of_all_blocks_whatever_their_batches():
    model = TableModel(11)
    ids = torch.randint(0, 11, (5, 8))
    exact = -model.table.double().log_softmax(-1)[ids[:, :-1], ids[:, 1:]].mean().item()
    for batches in ([ids], [ids[:3], ids[3:]]):
        loss = held_out_loss(model, batches)
        assert loss.num_tokens == 5 * 7
        assert loss.loss_nats == pytest.approx(exact, rel=1e-6)
        assert loss.perplexity == pytest.approx(math.exp(exact), rel=1e-6)


def test_mode_is_restored():
    model = TableModel(5).train()
    held_out_loss(model, [torch.zeros(1, 3, dtype=torch.long)])
    assert model.training


def test_perplexity_of_a_diverged_model_is_infinite():
    assert HeldOutLoss(1e4, 1).perplexity == math.inf


def test_a_guess_by_frequencies_is_their_entropy():
    rows = torch.tensor([[5, 0, 0], [5, 3, 1]])  # a row's first token is not predicted
    assert frequency_loss(rows) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
