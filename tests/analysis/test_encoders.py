"""Attention that looks ahead: every measure against a float64 computation that forms the whole matrix."""

import numpy as np
import pytest
import torch
import transformers as tf
from naive_measures import naive_of_layer, naive_updates
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from gated_attention.analysis import InputBatch, TextBatch, inspect_model
from gated_attention.analysis.encoders import encoder_of
from gated_attention.models.families.add_gates import add_gates
from gated_attention.models.families.layouts import find_attention
from gated_attention.spec import GateSpec

WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.3,
}  # fmt: skip
TEXT = {**WIDTHS, "vocab_size": 61, "max_position_embeddings": 64}
VISION = {**WIDTHS, "image_size": 24, "patch_size": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "cls_token_id": 1, "sep_token_id": 2}
SPEECH = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "vocab_size": 61, "num_mel_bins": 8, "max_source_positions": 40, "init_std": 0.3,
    "decoder_start_token_id": 2, **SPECIAL,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 61}
REGISTERS = ("cls", *["register"] * 4)
FAMILIES = {
    "BertForMaskedLM": (TEXT, "text", ()),
    "RobertaForMaskedLM": ({**TEXT, "pad_token_id": 0}, "text", ()),
    "DistilBertForMaskedLM": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 61, "initializer_range": 0.3},
        "text",
        (),
    ),
    "ModernBertForMaskedLM": (
        {**TEXT, **SPECIAL, "initializer_cutoff_factor": 9.0, "local_attention": 16, "global_attn_every_n_layers": 2},
        "text",
        (),
    ),
    "T5ForConditionalGeneration": ({**T5, "decoder_start_token_id": 0, "eos_token_id": None}, "text", ()),
    "ViTForImageClassification": (VISION, "image", ("cls",)),
    "DeiTForImageClassification": (VISION, "image", ("cls", "cls")),
    "Dinov2ForImageClassification": ({**VISION, "mlp_ratio": 2}, "image", ("cls",)),
    "Dinov2WithRegistersForImageClassification": ({**VISION, "mlp_ratio": 2}, "image", REGISTERS),
    "DINOv3ViTModel": ({**VISION, "num_register_tokens": 4}, "image", REGISTERS),
    "CLIPVisionModel": (VISION, "image", ("cls",)),
    "SiglipVisionModel": (VISION, "image", ()),
    "WhisperForConditionalGeneration": (SPEECH, "sound", ()),
}


def build(name):
    kind, (settings, _, _) = getattr(tf, name), FAMILIES[name]
    config = kind.config_class(**settings)
    torch.manual_seed(0)
    model = kind(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales and class tokens at their initial values hide a lot
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches_of(name):
    """Three sequences in two batches, and the reader's inputs of all three."""
    generator = torch.Generator().manual_seed(1)
    if FAMILIES[name][1] == "text":
        ids = torch.randint(3, 61, (3, 37), generator=generator)
        return [TextBatch(ids[:2]), TextBatch(ids[2:])], {"input_ids": ids}
    key, shape = ("pixel_values", (3, 3, 24, 24)) if FAMILIES[name][1] == "image" else ("input_features", (3, 8, 80))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [InputBatch({key: x[:2]}), InputBatch({key: x[2:]})], {key: x}


seen = []


def record(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if position_bias is None else scores + position_bias
    scores = scores if attention_mask is None else scores + attention_mask
    weights = scores.softmax(-1)
    seen.append((weights, value, visible_of(attention_mask, weights)))
    return (weights @ value).transpose(1, 2).contiguous(), None


def visible_of(mask, weights):
    return torch.ones_like(weights[:, 0]) if mask is None else (mask >= 0).double()[:, 0].expand(len(weights), -1, -1)


AttentionInterface.register("both_ways", record)
AttentionMaskInterface.register("both_ways", eager_mask)


def whole(model, reader, inputs):
    """Weights, values, what queries see, heads and layers' outputs, by layer."""
    layers = [one for one in find_attention(reader) if one.layer is not None]
    heads, states, hooks = [], [], []
    for one in layers:
        path = one.name.split(".")
        number = next(place for place, part in enumerate(path) if part.isdigit())
        layer = reader.get_submodule(".".join(path[: number + 1]))
        hooks.append(layer.register_forward_hook(lambda m, i, o: states.append(o[0] if isinstance(o, tuple) else o)))
        hooks.append(one.output_projection.register_forward_pre_hook(lambda m, i: heads.append(i[0])))
    model.set_attn_implementation("both_ways")
    reader.set_attn_implementation("both_ways")  # transformers 5.17 leaves the copy of a configuration alone
    seen.clear()
    with torch.no_grad():
        reader(**inputs)
    for hook in hooks:
        hook.remove()
    return [(*call, h.unflatten(-1, (4, -1)), s) for call, h, s in zip(seen, heads, states, strict=True)]


def expected_of(weights, value, visible, heads, special):
    """The measures by head, sequence by sequence."""
    n, h, length, _ = weights.shape
    received = (weights.sum(2) / visible.sum(1)[:, None]).numpy()
    norms = value.norm(dim=-1)
    ratios = (norms / norms.median(-1, keepdim=True).values).numpy()
    strongest = received.argmax(-1)
    share, of_value = np.zeros((n, h)), np.zeros((n, h))
    for sequence in range(n):
        for head in range(h):
            share[sequence, head] = received[sequence, head, strongest[sequence, head]]
            of_value[sequence, head] = ratios[sequence, head, strongest[sequence, head]]
    squares = torch.linalg.svdvals(heads.transpose(1, 2)).square()
    rank = (squares.sum(-1) / squares[..., 0]).numpy()
    found = {
        "f_attn": weights[..., 0].mean((0, 2)).numpy(),
        "f_attn_uniform": (visible[:, :, 0] / visible.sum(2)).mean().item(),
        "sink_rate": (received[..., 0] > 0.3).mean(0),
        "sink_share": share.mean(0),
        "sink_value": of_value.mean(0),
        "peak": share.mean(0),
        "peak_elsewhere": (strongest != 0).mean(0),
        "no_op_sink": ((share > 0.3) & (of_value <= 0.2)).mean(0),
        "broadcast_sink": ((share > 0.3) & (of_value >= 0.5) & (rank <= 1.5)).mean(0),
        "entropy": torch.special.entr(weights).sum(-1).mean((0, 2)).numpy(),
        "entropy_uniform": visible.sum(2).log().mean().item(),
        "value_drain": (norms[..., 0] / norms[..., 1:].median(-1).values).mean(0).numpy(),
        "size_after_gate": heads.abs().mean((0, 1, 3)).numpy(),
        **naive_updates(heads),
    }
    kinds = (*special, *["content"] * (length - len(special)))
    for kind in set(kinds) if special else ():
        places = [place for place, one in enumerate(kinds) if one == kind]
        found[f"attention_{kind}"] = weights[..., places].sum(-1).mean((0, 2)).numpy()
        found[f"strongest_{kind}"] = received[..., places].max(-1).mean(0)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_measure_equals_the_whole_matrix(name):
    model, (batches, inputs), special = build(name), batches_of(name), FAMILIES[name][2]
    found = inspect_model(model, batches, level="full")
    calls = whole(model, encoder_of(model), inputs)
    assert len(calls) == len(found.attention) == 2
    assert found.looks_ahead
    assert found.content == {"text": "token", "image": "patch", "sound": "frame"}[FAMILIES[name][1]]
    assert found.positions[: len(special) + 1] == (*special, "content")
    for layer, (weights, value, visible, heads, state) in enumerate(calls):
        expected = expected_of(weights, value, visible, heads, special) | naive_of_layer(state)
        for key, values in expected.items():
            rtol = 1e-3 if key == "update_rank" else 1e-5
            np.testing.assert_allclose(found.measures[key][layer], values, rtol=rtol, atol=1e-9, err_msg=key)
    np.testing.assert_allclose(found.attention_maps[0], calls[0][0][0].mean(0), atol=1e-3)
    assert np.isfinite(found.measures["effective_rank"]).all()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ViTForImageClassification"])
def test_gates_that_were_added_are_measured(name):
    model, (batches, inputs) = add_gates(build(name), GateSpec(granularity="headwise")), batches_of(name)
    found = inspect_model(model, batches)
    for layer, one in enumerate(attending(model)):
        read = []
        hook = one.g_proj.register_forward_pre_hook(lambda m, args, read=read: read.append(args[0]))
        with torch.no_grad():
            model.base_model(**inputs)
        hook.remove()
        scores = torch.sigmoid(read[0] @ one.g_proj.weight.mT)
        np.testing.assert_allclose(found.gates["sdpa"].measures["gate_mean"][layer], scores.detach().mean((0, 1)))
    assert len(found.excerpt) == (37 if name.startswith("Bert") else 0)


def attending(model):
    return [module for module in model.modules() if hasattr(module, "g_proj")]


def test_a_sink_on_another_patch_in_each_image_is_found_and_told_apart():
    """Class token, patch by patch: the strongest position is that of each image by itself."""
    model = build("ViTForImageClassification")
    (_, inputs), length = batches_of("ViTForImageClassification"), 37
    places, attention = (5, 20, 33), model.vit.layers[1].attention

    def keys(module, args, output):
        k = output.clone()
        k[..., :8] = 0
        for image, place in enumerate(places):
            k[image, place, 0] = 30.0
        return k

    def queries(module, args, output):
        q = output.clone()
        q[..., :8] = 0
        q[..., 0] = 1.0
        return q

    def values(module, args, output):
        v = output.clone()
        for image, place in enumerate(places):
            v[image, place, :8] = 0
        return v

    for projection, hook in ((attention.k_proj, keys), (attention.q_proj, queries), (attention.v_proj, values)):
        projection.register_forward_hook(hook)
    found = inspect_model(model, [InputBatch(inputs)]).measures
    assert found["sink_share"][1, 0] > 0.99
    assert found["strongest_content"][1, 0] > 0.99
    assert found["attention_cls"][1, 0] < 0.01
    assert found["sink_value"][1, 0] == 0
    assert found["no_op_sink"][1, 0] == 1
    assert found["f_attn"][1, 0] < 1 / length


def test_named_positions_of_texts_have_measures_of_their_own():
    model, (_, inputs) = build("BertForMaskedLM"), batches_of("BertForMaskedLM")
    kinds = ("cls", *["content"] * 35, "sep")
    found = inspect_model(model, [TextBatch(inputs["input_ids"], None, kinds)]).measures
    np.testing.assert_allclose(found["attention_cls"], found["f_attn"])
    total = sum(found[f"attention_{kind}"] for kind in ("cls", "content", "sep"))
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_inputs_of_unknown_name_are_refused():
    with pytest.raises(ValueError, match="was given pixels; give one of input_ids, pixel_values"):
        inspect_model(build("ViTForImageClassification"), [InputBatch({"pixels": torch.zeros(1, 3, 24, 24)})])
