"""`attn_implementation="gated_attention"`: the same model, its gate formed with the attention."""

import pytest
import torch

from gated_attention import (
    GatedQwen3Config,
    GatedQwen3ForCausalLM,
    GatedQwen3MoeConfig,
    GatedQwen3MoeForCausalLM,
    GateSpec,
)
from gated_attention.ops.skip import eager

IDS = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))


def model_of(gates, **options):
    torch.manual_seed(0)
    config = GatedQwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, gates=gates, **options,
    )  # fmt: skip
    return GatedQwen3ForCausalLM(config).eval()


def moe_of(gates):
    torch.manual_seed(0)
    config = GatedQwen3MoeConfig(
        vocab_size=50, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        gates=gates,
    )  # fmt: skip
    return GatedQwen3MoeForCausalLM(config).eval()


GATES = [
    (),
    GateSpec(),
    GateSpec(granularity="headwise"),
    GateSpec(granularity="headwise", input_dim=12, bias=0.5),
    (GateSpec(), GateSpec("value")),
]


@pytest.mark.parametrize("gates", GATES)
def test_logits_gradients_and_generation_are_those_of_sdpa(gates):
    model = model_of(gates)
    found = []
    for implementation in ("sdpa", "gated_attention"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(IDS, labels=IDS)
        out.loss.backward()
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        found.append((out.logits, *(p.grad for p in model.parameters()), tokens))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_from_pretrained_takes_the_name(tmp_path):
    model = model_of(GateSpec())
    model.save_pretrained(tmp_path)
    loaded = GatedQwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="gated_attention")
    assert loaded.config._attn_implementation == "gated_attention"
    torch.testing.assert_close(loaded.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("use_cache", [False, True])
def test_it_compiles_whole(use_cache):
    model = model_of(GateSpec(granularity="headwise"))
    model.set_attn_implementation("gated_attention")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=use_cache).logits, model(IDS).logits)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("kind", [model_of, moe_of])
def test_compiled_models_are_causal_without_a_mask(kind):
    """A mask makes PyTorch's attention score what it hides, on repeated keys and values."""
    model, calls = kind(GateSpec()), []

    def note_calls(graph, _):
        calls.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=note_calls)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits)
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * 2


@pytest.mark.usefixtures("without_shape_checks")
def test_documents_told_by_positions_stay_apart_when_compiled():
    model = model_of(GateSpec())
    positions = torch.cat((torch.arange(9), torch.arange(8))).expand(2, -1)
    packed = torch.compile(model, backend="aot_eager")(IDS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 9:], model(IDS[:, 9:]).logits)


def test_what_it_cannot_do_is_an_error():
    model = model_of(GateSpec())
    model.set_attn_implementation("gated_attention")
    bias = torch.zeros(2, 1, IDS.shape[1], IDS.shape[1])
    with pytest.raises(ValueError, match=r"takes boolean masks, not torch\.float32; use 'eager' for a bias"):
        model(IDS, attention_mask=bias)
    dropout = model_of(GateSpec(), attention_dropout=0.1).train()
    dropout.set_attn_implementation("gated_attention")
    with pytest.raises(ValueError, match=r"has no dropout, 0\.1"):
        dropout(IDS)
    silu = model_of(GateSpec(activation="silu"))
    silu.set_attn_implementation("gated_attention")
    with pytest.raises(ValueError, match=r"G1 sdpa elementwise silu.*use 'sdpa'"):
        silu(IDS)


HARD = GateSpec(granularity="headwise", activation="hard_sigmoid", bias=-1.0, input_dim=12)


@pytest.mark.parametrize("kind", [model_of, moe_of])
def test_skipping_closed_gates_changes_nothing(kind):
    model = kind(HARD)
    with torch.no_grad():
        for gate in (m for m in model.modules() if hasattr(m, "gate_spec")):
            gate.weight.mul_(100)
    positions = torch.cat((torch.arange(9), torch.arange(8))).expand(2, -1)
    found = []
    for implementation in ("sdpa", "gated_attention_skip"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(IDS, labels=IDS)
        out.loss.backward()
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        packed = model(IDS, position_ids=positions, use_cache=False).logits
        found.append((out.logits, packed, *(p.grad for p in model.parameters()), tokens))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_it_does_skip(monkeypatch):
    model, shares = model_of(HARD), []
    run = eager.attention_forward
    monkeypatch.setattr(
        eager,
        "attention_forward",
        lambda q, k, v, s, rows, *rest: (
            shares.append(rows.before[..., -1].sum() / rows.order.numel()) or run(q, k, v, s, rows, *rest)
        ),
    )
    with torch.no_grad():
        for gate in (m for m in model.modules() if hasattr(m, "gate_spec")):
            gate.weight.mul_(100)
    model.set_attn_implementation("gated_attention_skip")
    model(IDS)
    assert len(shares) == 2
    assert all(0.1 < share < 0.9 for share in shares)


@pytest.mark.usefixtures("without_shape_checks")
def test_skipping_compiles_whole():
    model = model_of(HARD)
    model.set_attn_implementation("gated_attention_skip")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits)


def test_what_cannot_skip_is_an_error():
    for gates in (GateSpec(), GateSpec(activation="hard_sigmoid"), GateSpec(granularity="headwise")):
        model = model_of(gates)
        model.set_attn_implementation("gated_attention_skip")
        with pytest.raises(ValueError, match=r"skips closed gates, one hard_sigmoid per head.*use 'sdpa'"):
            model(IDS)
    model = model_of(HARD)
    model.set_attn_implementation("gated_attention_skip")
    padding = torch.ones(2, 17).long()
    padding[0, :3] = 0
    with pytest.raises(ValueError, match=r"takes no mask, as of padding, a window or a static cache; use 'sdpa'"):
        model(IDS, attention_mask=padding)
    ungated = model_of(GateSpec("value", "headwise"))
    expected = ungated(IDS).logits
    ungated.set_attn_implementation("gated_attention_skip")
    torch.testing.assert_close(ungated(IDS).logits, expected)
