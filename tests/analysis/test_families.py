"""Every family of transformers with an output gate: what is measured against what the family's own code computes."""

import re
import sys
from collections import defaultdict
from functools import cache
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gated_families import EXPERTS, FAMILIES, HEAD, SMALL, build
from torch import nn

from gated_attention.analysis import inspect_model
from gated_attention.analysis.capture import _watched_lse_attention
from gated_attention.analysis.gates import _ROWS

MODELS = Path(transformers.__file__).parent / "models"
EACH_KIND = (
    "Lfm3Config",  # headwise
    "LagunaConfig, elementwise",  # softplus
    "BeamConfig",  # a bias of each head
    "DoryConfig",  # layers that run twice, a norm behind the gate
    "AXK2Config",  # latent and sparse attention, packed
    "HYV4Config",  # beside sinks, several residual streams
    "Inkling2TextConfig",  # inside of the output projection, beside biases and sinks of every query
    "BailingHybridConfig",  # linear attention, whose gate is another
)
NAMED = {
    "MiniMaxConfig": {"output_gate": "MiniMaxLightningAttention is not softmax attention"},
    "BailingHybridConfig": {
        "forget_gate": "BailingHybridDeltaAttention is not softmax attention",
        "g_proj": "BailingHybridDeltaAttention is not softmax attention",
    },
}


def built(name):
    if not hasattr(transformers, name.partition(",")[0]):
        pytest.skip(f"transformers {transformers.__version__} has no such family")
    return build(name)


def own_eager(model, ids, monkeypatch):
    """What softmax attention returned, what its last projection read, and what every layer returned, run by run."""
    runs, states, open_runs = [], [], []
    softmax = {}

    def enter(module, args, kwargs):
        open_runs.append({"module": module})

    def leave(module, args, output):
        run = open_runs.pop()
        if "out" in run:
            runs.append(run)

    def last(module, args):
        if open_runs:
            open_runs[-1]["projected"] = args[0]

    def keep(name, of):
        def hook(module, args, output):
            open_runs[-1][name] = args[0] if of == "input" else output

        return hook

    def own(eager):
        def record(module, *args, **kwargs):
            out, weights = eager(module, *args, **kwargs)
            if open_runs and open_runs[-1]["module"] is module:
                open_runs[-1].update(out=out, weights=weights)
            return out, weights

        return record

    def state(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("DecoderLayer"):
            hooks.append(module.register_forward_hook(state))
        if kind.endswith("Attention"):
            softmax[type(module).__module__] = sys.modules[type(module).__module__]
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
            hooks += [m.register_forward_pre_hook(last) for m in module.modules() if isinstance(m, nn.Linear)]
            for name, of in (
                ("o_norm", "output"),
                ("attn_sub_norm", "input"),
            ):  # around the gate of Muse Spark, of Dory
                if hasattr(module, name):
                    hooks.append(getattr(module, name).register_forward_hook(keep(name, of)))
    for code in softmax.values():
        monkeypatch.setattr(code, "eager_attention_forward", own(code.eager_attention_forward))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return runs, states


def scores_of(run):
    """The ratio of what stands behind the gate to what stands before it, (B, T, H, D)."""
    before = run["o_norm"] if "o_norm" in run else run["out"]
    after = run["attn_sub_norm"] if "attn_sub_norm" in run else run["projected"]
    return after.reshape(before.shape).double() / before.double()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EACH_KIND else pytest.mark.trust) for name in FAMILIES]
)
def test_gates_and_attention_are_those_of_the_familys_own_code(name, monkeypatch):
    model = built(name)
    ids = torch.randint(0, 50, (3, 24), generator=torch.Generator().manual_seed(3))
    found = inspect_model(model, [ids[:2], ids[2:]], level="full")
    runs, states = own_eager(model, ids, monkeypatch)
    assert found.unmeasured_gates == NAMED.get(name, {})
    layers = np.flatnonzero(found.attention)
    assert len(found.attention) == len(states)
    assert len(layers) == len(runs)
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found.measures["m_act"], [state.abs().max() for state in states], **close)
    expected = defaultdict(list)
    for run in runs:
        heads = run["out"].shape[2]
        weights = run["weights"]
        expected["f_attn"].append(weights[:, :, 1:, 0].mean((0, 2)))
        expected["peak"].append(naive_peak(weights))
        expected["size_before_gate"].append(run["out"].abs().mean((0, 1, 3)))
        expected["size_after_gate"].append(run["projected"].unflatten(-1, (heads, -1)).abs().mean((0, 1, 3)))
    for key, values in expected.items():
        for layer, value in zip(layers, values, strict=True):
            np.testing.assert_allclose(found.measures[key][layer, : len(value)], value, err_msg=key, **close)
    if name in ("MiniMaxConfig", "Lfm3Config, no gate"):
        assert not found.gates
        return
    gate = found.gates["sdpa"]
    for layer, run in zip(layers, runs, strict=True):
        scores = scores_of(run)
        if gate.spec.granularity == "headwise":
            torch.testing.assert_close(scores, scores[..., :1].expand_as(scores), rtol=1e-4, atol=1e-6)
        by_head = scores.mean((0, 1, 3))
        assert by_head.std() > 1e-3  # heads in another order would be seen
        measured = {key: values[layer, : len(by_head)] for key, values in gate.measures.items()}
        np.testing.assert_allclose(measured["gate_mean"], by_head, **close)
        np.testing.assert_allclose(measured["gate_first"], scores[:, 0].mean((0, 2)), **close)
        np.testing.assert_allclose(measured["gate_share_below_0.1"], (scores < 0.1).double().mean((0, 1, 3)), **close)
        np.testing.assert_allclose(gate.excerpt[layer, : len(by_head)], scores[0].mean(-1).T, **close)


def naive_peak(weights):
    """What the strongest key of the first half gets, averaged over the queries that see it, then over sequences."""
    seen = (weights > 0).sum(2).clamp(min=1)
    return (weights.sum(2) / seen)[..., : weights.shape[-1] // 2].max(-1).values.mean(0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("NeoMMEConfig", {**SMALL, **HEAD}, "NeoMMEAttention keeps its projections under unknown names"),
        (
            "MiniMaxM3VLTextConfig",
            {
                **SMALL, **HEAD, **EXPERTS, "num_local_experts": 4, "layer_types": ["minimax_m3_sparse"] * 2,
                "index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2, "index_head_dim": 16,
            },
            "MiniMaxM3VLAttention attends to blocks of keys",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(name, fields, message):
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no such family")
    model = transformers.AutoModel.from_config(config(**fields)).eval()
    with pytest.raises(ValueError, match=message) as error:
        inspect_model(model, [torch.zeros(1, 24, dtype=torch.long)])
    assert "\n" not in str(error.value)


def test_layers_that_run_twice_unannounced_are_refused():
    model = build("Lfm3Config") if hasattr(transformers, "Lfm3Config") else build("AfmoeConfig")
    decoder = model.get_decoder()
    once = decoder.layers[0].forward
    decoder.layers[0].forward = lambda x, **kwargs: decoder.layers[1](once(x, **kwargs), **kwargs)
    with pytest.raises(ValueError, match="layer 1 runs more than once in a pass"):
        inspect_model(model, [torch.zeros(1, 24, dtype=torch.long)])


def test_a_model_with_images_has_the_gates_of_its_text_model():
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16,
    }  # fmt: skip
    tokens = {f"{name}_token_id": 49 for name in ("image", "video", "vision_start", "vision_end")}
    text = FAMILIES["Qwen3_5TextConfig"]
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **tokens)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    found = inspect_model(model, [torch.arange(24)[None]])
    assert found.gates["sdpa"].measures["gate_mean"].shape == (2, 4)


NO_OUTPUT_GATE = {
    "DogeAttention": "a softplus in its mask",
    "Glm5NextTextAttention": "a gate in its indexer",
    "NeoMMEAttention": "a gate inside of its output projection",
    "EsmFold2AtomAttention": "of molecules",
    "EsmFold2DiffusionAttention": "of molecules",
    "TimesFmAttention": "a softplus of the scale",
    "TimesFm2_5Attention": "a softplus of the scale",
    "VideoPrismMultiheadAttentionPoolingHead": "of images",
}
SEEN_ELSEWHERE = {
    "attention_mask", "dropout", "sliding_window", "position_ids", "output_attentions", "deterministic", "query", "key",
    "value", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


@cache
def modeling_files():
    """The text of every file of this transformers that calls the attention interface."""
    texts = [path.read_text() for path in sorted(MODELS.glob("*/modeling_*.py"))]
    return [text for text in texts if "ALL_ATTENTION_FUNCTIONS.get_interface" in text]


def softmax_attention():
    """Every class that calls the attention interface: its name, and its code with that of the modules it is made of."""
    for text in modeling_files():
        blocks = re.split(r"^(?=\w|@)", text, flags=re.MULTILINE)
        code = {found[1]: block for block in blocks if (found := re.match(r"class (\w+)", block))}
        for name, own in code.items():
            if "ALL_ATTENTION_FUNCTIONS.get_interface" not in own:
                continue
            parts = new = {name}
            while new:
                new = {made for part in new for made in re.findall(r"\b(\w+)\(", code[part]) if made in code} - parts
                parts = parts | new
            yield name, "\n".join(code[part] for part in sorted(parts))


@pytest.mark.trust
def test_no_family_of_this_transformers_has_a_gate_without_a_row():
    looks_gated = re.compile(r"self\.(\w+_)?gate\w*|self\.g_proj|(sigmoid|softplus|tanh)\(|\.sigmoid\(\)")
    gated = {name for name, code in softmax_attention() if looks_gated.search(code)}
    assert gated - set(_ROWS) - set(NO_OUTPUT_GATE) == set()
    assert "AfmoeAttention" in gated  # the search finds what it should


@pytest.mark.trust
def test_whatever_this_transformers_hands_to_attention_is_read_or_refused():
    read = set(signature(_watched_lse_attention).parameters) | SEEN_ELSEWHERE
    # Calls are indented alike to their closing parenthesis.
    call = re.compile(
        r"^( *)(?:\w[^\n]*= )?(?:attention_interface|attn_fn|attention_fn)\(\n(.*?)^\1\)", re.MULTILINE | re.DOTALL
    )
    calls = [found[2] for text in modeling_files() for found in call.finditer(text)]
    handed = {name for text in calls for name in re.findall(r"^ +(\w+)=", text, flags=re.MULTILINE)}
    assert handed - read == set()
    assert {"s_aux", "position_bias", "indices"} <= handed
