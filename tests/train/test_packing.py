"""Documents that are kept apart do not reach each other: logits, losses, gradients, and the held-out loss."""

import itertools

import pytest
import torch

from gated_attention import ops
from gated_attention.evaluate.loss import held_out_loss, next_token_losses
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec
from gated_attention.train.text.blocks import Blocks, collate, positions

OPENER = 0
BLOCKS = {
    "none": BlockSpec(),
    "elementwise": BlockSpec(GateSpec()),
    "sink": BlockSpec(GateSpec(granularity="headwise", input="lse", bias=0.0)),
}


def model_of(block, implementation="sdpa"):
    model = build_model(make_config(SIZES["tiny"], BLOCKS[block], num_hidden_layers=2), 0)
    model.set_attn_implementation(implementation)
    return model.eval()


def blocks():
    """Two blocks of three documents each, the first of which ends without having begun."""
    ids = torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 11] = ids[:, 20] = OPENER
    return Blocks(ids.numpy().astype("uint16"), OPENER)


@pytest.mark.parametrize(
    ("block", "implementation"),
    [*itertools.product(BLOCKS, ("eager", "sdpa")), ("none", "gated_attention"), ("elementwise", "gated_attention")],
)
def test_a_document_is_read_as_if_it_were_alone(block, implementation):
    model = model_of(block, implementation)
    (batch,) = blocks().batches(2)
    with torch.no_grad():
        packed = model(**batch).logits
        for start, stop in ((0, 11), (11, 20), (20, 32)):
            alone = model(input_ids=batch["input_ids"][:, start:stop]).logits
            torch.testing.assert_close(packed[:, start:stop], alone, atol=2e-6, rtol=0)
        whole = model(input_ids=batch["input_ids"]).logits
    assert (packed - whole)[:, 20:].abs().max() > 1e-3  # as one sequence it is another text


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "gated_attention"])
def test_no_gradient_crosses_between_documents(implementation):
    model = model_of("elementwise", implementation)
    batch = collate([blocks()[0]])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
    logits[:, 11:20].square().sum().backward()
    reached = embedded.grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == [11 <= i < 20 for i in range(32)]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_attention_is_told_where_documents_begin(compiled, monkeypatch, without_shape_checks):
    model, found = model_of("elementwise", "gated_attention"), []
    fused = ops.gated_attention
    monkeypatch.setattr(ops, "gated_attention", lambda *x, **options: found.append(options) or fused(*x, **options))
    run = torch.compile(model, backend="eager") if compiled else model
    run(**blocks().batches(2)[0])
    assert [options["mask"] for options in found] == [None, None]
    assert found[0]["first_keys"].tolist() == [[0] * 11 + [11] * 9 + [20] * 12] * 2


def test_the_held_out_loss_is_of_documents_read_apart():
    model, data = model_of("none"), blocks()
    found = held_out_loss(model, data.batches(1))
    assert found.num_tokens == 2 * 31
    losses = []
    with torch.no_grad():
        for row in data.id_batches(1):
            for start, stop in ((0, 11), (11, 20), (20, 32)):
                # The token that opens the next document is predicted from this one; it sees no other.
                logits = model(input_ids=row[:, start:stop]).logits
                targets = row[:, start + 1 : min(stop + 1, 32)]
                losses.append(
                    torch.nn.functional.cross_entropy(logits[0, : targets.shape[1]], targets[0], reduction="none")
                )
    assert found.loss_nats == pytest.approx(torch.cat(losses).double().mean().item(), abs=1e-6)
    apart = next_token_losses(model, **data.batches(2)[0]).mean()
    together = next_token_losses(model, data.id_batches(2)[0]).mean()
    assert abs(apart - together) > 1e-4


def test_positions_count_from_every_opener():
    ids = torch.tensor([[5, 0, 7, 0, 0, 9], [0, 1, 2, 3, 4, 5]])
    assert positions(ids, 0).tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
