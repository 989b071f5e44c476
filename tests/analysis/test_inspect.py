"""Every measure against a float64 computation that forms the whole attention matrix, for every family."""

import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_measures import (
    PACKED,
    attention_of,
    naive,
    naive_of_attention,
    naive_of_layer,
    naive_scores,
    projection_of,
    quantile_of_bins,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import gated_attention
from gated_attention.analysis import GATE_MEASURES, MEASURES, TextBatch, inspect_model
from gated_attention.analysis.attention import AttentionCall
from gated_attention.models import GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec

PACKAGE = Path(gated_attention.__file__).parent
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gpt_neox", "gpt2", "gpt_oss", "olmo2",
    "qwen3_next", "qwen3_5_text", "phi3", "deepseek_v3", "afmoe",
)  # fmt: skip
GATES = {
    "none": (),
    "headwise": (GateSpec(granularity="headwise"),),
    "elementwise, value": (GateSpec(), GateSpec("value")),
    "head-shared": (GateSpec(head_shared=True),),
    "parameter": (GateSpec(input="parameter", init="normal"),),
    "silu": (GateSpec(activation="silu", combine="add"),),
    "output": (GateSpec("output"),),
    "key, query": (GateSpec("key"), GateSpec("query")),
    "reads 12": (GateSpec(input_dim=12, bias=1.0, scale=2.0),),
}
OURS = [f"ours, {name}" for name in GATES] + ["ours, mixture of experts"]


def gated_model(gates):
    size = SIZES["tiny"]
    config = make_config(size, BlockSpec(gates), vocab_size=50, initializer_range=0.3, max_position_embeddings=128)
    return build_model(config, 0)


def moe_model():
    config = GatedQwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=50,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, initializer_range=0.3, gates=GateSpec(),
        max_position_embeddings=128,
    )  # fmt: skip
    model = build_model(config, 0)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def build(build_family):
    def build_any(name):
        if name == "ours, mixture of experts":
            return moe_model().double().eval()
        if name.startswith("ours"):
            return gated_model(GATES[name.removeprefix("ours, ")]).double().eval()
        return build_family(name)

    return build_any


@pytest.fixture
def ids():
    return torch.randint(0, 50, (4, 61), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [*FAMILIES, *OURS])
def test_every_measure_equals_the_whole_matrix(name, ids, build):
    model = build(name)
    starts = torch.tensor([True, False, True, True])
    found = inspect_model(
        model,
        [TextBatch(ids[:3], starts[:3]), TextBatch(ids[3:], starts[3:])],
        level="full",
        map_layers=[3] if name in PACKED else [0],
    )
    calls, states, has_attention = naive(model, ids)
    np.testing.assert_array_equal(found.attention, has_attention)
    expected = defaultdict(list)
    for call in calls:
        for key, value in naive_of_attention(call, starts.numpy()).items():
            expected[key].append(value)
    for state in states:
        for key, value in naive_of_layer(state).items():
            expected[key].append(value)
    for key, values in expected.items():
        measured = found.measures[key]
        if len(values) < len(measured):
            assert np.isnan(measured[~has_attention]).all()
            measured = measured[has_attention]
        rtol = 1e-3 if key == "update_rank" else 1e-5
        np.testing.assert_allclose(measured, np.stack(values), rtol=rtol, atol=1e-9, err_msg=key)
    ranks = {name for name in found.measures if name.startswith("effective_rank")}
    assert bool(ranks) == (name != "deepseek_v3")  # whose values have no single matrix
    assert set(found.measures) == set(expected) | ranks
    first = calls[0]["weights"][0, :, :48, :48].mean(0)
    np.testing.assert_allclose(found.attention_maps[0], first, atol=1e-3)  # stored as float16


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_those_of_the_models_own_eager_attention(name, ids, build):
    model = build(name)
    calls, _, _ = naive(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for call, expected in zip(calls, [a for a in attentions if a is not None], strict=True):
        torch.testing.assert_close(call["weights"], expected.double(), rtol=1e-5, atol=1e-6)


GATED = [*PACKED, "afmoe", *[name for name in OURS if name != "ours, none"]]


@pytest.mark.parametrize("name", GATED)
def test_gate_scores_equal_their_formula(name, ids, build):
    model = build(name)
    found = inspect_model(model, [ids[:3], ids[3:]], level="full")
    expected = naive_scores(name, model, ids)
    assert set(found.gates) == set(expected)
    for site, layers in expected.items():
        gate = found.gates[site]
        assert set(gate.measures) == set(GATE_MEASURES)
        low, high = gate.edges[[0, -1]]
        token_means = []
        for layer, scores in layers.items():
            token_means.append(scores.detach().mean((2, 3)))
            measured = {key: values[layer] for key, values in gate.measures.items()}
            s = scores.detach().numpy()
            close = {"rtol": 1e-5, "atol": 1e-9}
            np.testing.assert_allclose(measured["gate_mean"], s.mean((0, 1, 3)), **close)
            np.testing.assert_allclose(measured["gate_share_below_0.1"], (s < 0.1).mean((0, 1, 3)), **close)
            np.testing.assert_allclose(measured["gate_share_above_0.9"], (s > 0.9).mean((0, 1, 3)), **close)
            np.testing.assert_allclose(measured["gate_share_open"], (s > 0).mean((0, 1, 3)), **close)
            np.testing.assert_allclose(measured["gate_first"], s[:, 0].mean((0, 2)), **close)
            np.testing.assert_allclose(measured["gate_rest"], s[:, 1:].mean((0, 1, 3)), **close)
            np.testing.assert_allclose(gate.excerpt[layer], s[0].mean(-1).T, **close)
            for head in range(s.shape[2]):
                values = np.clip(s[:, :, head].ravel(), low, high)
                counts, _ = np.histogram(values, bins=50, range=(low, high))
                ours = gate.histogram[layer, head] * (len(values) / gate.histogram[layer, head].sum())
                np.testing.assert_allclose(ours, counts, atol=1e-6)
                for percent in (5, 25, 50, 75, 95):
                    exact = quantile_of_bins(counts, gate.edges, percent / 100)
                    assert measured[f"gate_quantile_{percent:02d}"][head] == pytest.approx(exact, rel=1e-5)
        mean = torch.stack(token_means).mean(0).numpy().ravel()
        flat = ids.numpy().ravel()
        by_id = [mean[flat == i].mean() if (flat == i).any() else 0.0 for i in range(50)]
        sums, counts = gate.by_token_id
        np.testing.assert_allclose(np.divide(sums, counts, out=np.zeros(50), where=counts > 0), by_id, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "phi3", "afmoe", "ours, elementwise, value", "ours, headwise"]
)
def test_effective_rank_is_that_of_the_whole_map(name, ids, build):
    model = build(name)
    found = inspect_model(model, [ids], level="full").measures
    attention = attention_of((model.get_decoder().layers if name != "gpt2" else model.get_decoder().h)[1])
    projection = projection_of(attention)
    width = projection.weight.shape[0] if name == "gpt2" else projection.weight.shape[1]
    num_heads, head_dim = found["f_attn"].shape[1], width // found["f_attn"].shape[1]
    out = (projection.weight.T if name == "gpt2" else projection.weight).detach()
    if name == "gpt2":
        value = attention.c_attn.weight.detach().T[64:].unflatten(0, (4, 8))
    elif name == "gpt_neox":
        value = attention.query_key_value.weight.detach().unflatten(0, (4, 3, 8))[:, 2]
    elif name == "phi3":
        value = attention.qkv_proj.weight.detach()[32 + 16 :].unflatten(0, (2, 8))
    else:
        value = attention.v_proj.weight.detach().unflatten(0, (-1, head_dim))
    means = torch.ones(num_heads, head_dim, dtype=torch.float64)
    for site, scores in (naive_scores(name, model, ids) if "effective_rank_gated" in found else {}).items():
        mean = scores[1].detach().mean((0, 1))
        means = means * (mean.repeat_interleave(num_heads // len(value), 0) if site == "value" else mean)
    for key, diagonal in (("effective_rank", torch.ones_like(means)), ("effective_rank_gated", means)):
        for head in range(num_heads if key in found else 0):
            w_o = out[:, head * head_dim : (head + 1) * head_dim]
            whole = w_o @ torch.diag(diagonal[head]) @ value[head * len(value) // num_heads]
            p = torch.linalg.svdvals(whole)
            p = p[:head_dim] / p[:head_dim].sum()
            assert found[key][1, head] == pytest.approx(torch.special.entr(p).sum().exp().item(), rel=1e-5)


def test_batches_do_not_change_a_measure(ids, build):
    model = build("ours, headwise")
    whole, parts = inspect_model(model, [ids], level="full"), inspect_model(model, [ids[:1], ids[1:]], level="full")
    for name, values in whole.measures.items():
        np.testing.assert_allclose(values, parts.measures[name], rtol=1e-9, err_msg=name)


def test_a_summary_is_the_cheap_part_of_a_full_inspection(ids, build):
    model = build("ours, headwise")
    summary, full = inspect_model(model, [ids]), inspect_model(model, [ids], level="full")
    assert set(summary.measures) == {name for name in full.measures if not MEASURES[name].full}
    for name, values in summary.measures.items():
        np.testing.assert_array_equal(values, full.measures[name])


def test_blocks_of_queries_do_not_change_a_measure(ids, build, monkeypatch):
    for name in ("llama", "gemma2", "gpt_oss", "ours, elementwise, value"):
        model = build(name)
        found = inspect_model(model, [ids], level="full")
        whole = found.measures
        monkeypatch.setattr("gated_attention.analysis.attention.BLOCK_ELEMENTS", 4 * 4 * 61 * 7)
        monkeypatch.setattr("gated_attention.analysis.attention._MASKED_QUERIES", 7)
        for part in ("whole_tensors", "hidden_states"):
            monkeypatch.setattr(f"gated_attention.analysis.measures.{part}.BLOCK_ELEMENTS", 4 * 32 * 7)
        found_in_blocks = inspect_model(model, [ids], level="full")
        blocks = found_in_blocks.measures
        monkeypatch.undo()
        for site, gate in found.gates.items():
            for key, values in gate.measures.items():
                np.testing.assert_allclose(values, found_in_blocks.gates[site].measures[key], rtol=1e-9, err_msg=key)
        for key, values in whole.items():
            np.testing.assert_allclose(values, blocks[key], rtol=1e-9, err_msg=f"{name} {key}")


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("level", ["summary", "full"])
def test_no_square_matrix_is_formed(level, monkeypatch):
    length = 1024
    monkeypatch.setattr("gated_attention.analysis.attention.BLOCK_ELEMENTS", 2**17)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=50,
        intermediate_size=32, max_position_embeddings=length,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with LargestTensor() as largest:
        inspect_model(model, [torch.randint(0, 50, (1, length))], level=level)
    assert largest.numel < length * length / 2


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(ids, fails):
    model = gated_model(GATES["headwise"]).train()
    model.set_attn_implementation("eager")

    def blocks():
        yield ids
        if fails:
            raise RuntimeError("the text broke off")

    if fails:
        with pytest.raises(RuntimeError, match="broke off"):
            inspect_model(model, blocks())
    else:
        inspect_model(model, blocks())
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_autocast_reads_the_same_attention(ids):
    model = gated_model(GATES["headwise"]).eval()
    plain = inspect_model(model, [ids], level="full").measures
    with torch.autocast("cpu", torch.bfloat16):
        low = inspect_model(model, [ids], level="full").measures
    for name in ("f_attn", "entropy", "size_after_gate", "kurtosis"):
        np.testing.assert_allclose(low[name], plain[name], rtol=0.15, atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one block"),
        ([torch.zeros(1, 1, dtype=torch.long)], "from 2 on"),
        ([torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)], "one length"),
    ],
)
def test_unfit_text_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        inspect_model(gated_model(()), batches)


def test_a_layer_without_attention_has_no_map(ids, build):
    with pytest.raises(ValueError, match="layer 1 has no softmax attention to map; choose from 3"):
        inspect_model(build("qwen3_next"), [ids], map_layers=[1])


def test_an_unknown_level_is_refused(ids, without_shape_checks):
    with pytest.raises(ValueError, match="unknown level 'deep'; choose from summary, full"):
        inspect_model(gated_model(()), [ids], level="deep")


def test_weights_of_a_block_are_a_block_of_the_weights():
    q, k, v = torch.randn(3, 2, 4, 20, 8, dtype=torch.float64)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), float("-inf"))
    call = AttentionCall(0, q, k, v, (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1), 0.3)
    torch.testing.assert_close(call.weights(slice(5, 12), slice(3, 20)), scores.softmax(-1)[:, :, 5:12, 3:20])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["elementwise, value", "headwise"])
def test_a_gpu_in_half_precision_finds_what_float64_finds(name):
    ids = torch.randint(0, 50, (4, 128))
    exact = inspect_model(gated_model(GATES[name]).double().eval(), [ids], level="full")
    found = inspect_model(gated_model(GATES[name]).bfloat16().cuda().eval(), [ids[:2], ids[2:]], level="full")
    for key in ("f_attn", "sink_share", "entropy", "m_act", "kurtosis", "size_before_gate", "size_after_gate"):
        np.testing.assert_allclose(found.measures[key], exact.measures[key], rtol=0.15, atol=5e-3, err_msg=key)
    for site, gate in exact.gates.items():
        for key in ("gate_mean", "gate_share_below_0.1", "gate_first"):
            ours = found.gates[site].measures[key]
            np.testing.assert_allclose(ours, gate.measures[key], rtol=0.15, atol=2e-2, err_msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["summary", "full"])
def test_no_layer_waits_for_the_device(level):
    model = gated_model(GATES["elementwise, value"]).bfloat16().cuda().eval()
    ids = torch.randint(0, 50, (4, 128))
    inspect_model(model, [ids], level=level)  # kernels are chosen

    def batches():
        torch.cuda.set_sync_debug_mode("warn")
        yield from ids.split(2)
        torch.cuda.set_sync_debug_mode("default")

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inspect_model(model, batches(), level=level)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # transformers' own mask may wait, once a batch.
    assert not [warning for warning in caught if Path(warning.filename).is_relative_to(PACKAGE)]
