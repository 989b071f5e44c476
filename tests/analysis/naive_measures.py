"""The measures computed naively: every tensor kept, every weight formed, definitions written out once more."""

from collections import defaultdict

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

PACKED = ("qwen3_next", "qwen3_5_text")
"""Families that pack gates with queries."""


seen = []


def naive_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(attention_mask < 0, float("-inf"))
    if s_aux is None:
        full = scores.softmax(-1)
    else:
        full = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)], -1).softmax(-1)
    weights = full[..., : scores.shape[-1]]
    out = (weights @ v).transpose(1, 2).contiguous()
    visible = (attention_mask >= 0)[0, 0]
    entropy = torch.special.entr(full).sum(-1).mean(-1)
    seen.append({"weights": weights, "value": value, "out": out, "visible": visible, "entropy": entropy})
    return out, None


AttentionInterface.register("naive_recording", naive_attention)
AttentionMaskInterface.register("naive_recording", eager_mask)


def attention_of(layer):
    return next((getattr(layer, name) for name in ("self_attn", "attn", "attention") if hasattr(layer, name)), None)


def projection_of(attention):
    return next(getattr(attention, name) for name in ("o_proj", "c_proj", "dense") if hasattr(attention, name))


def naive(model, ids):
    """Everything that the model computes on the text, by layer: with attention (A), and of all layers (h)."""
    decoder = model.get_decoder()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    model.set_attn_implementation("naive_recording")
    seen.clear()
    states, heads, blocks, hooks = [], [], [], []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda m, i, o: states.append(o[0] if isinstance(o, tuple) else o)))
        if (attention := attention_of(layer)) is not None:
            hooks.append(projection_of(attention).register_forward_pre_hook(lambda m, i: heads.append(i[0])))
            hooks.append(attention.register_forward_hook(lambda m, i, o: blocks.append(o[0])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    calls = [
        {**call, "heads": h.unflatten(-1, call["out"].shape[2:]), "block": b}
        for call, h, b in zip(seen, heads, blocks, strict=True)
    ]
    has_attention = np.array([attention_of(layer) is not None for layer in layers])
    return calls, states, has_attention


def naive_of_attention(call, starts):
    weights, visible = call["weights"].numpy(), call["visible"].numpy()
    length = weights.shape[-1]
    received = weights.sum(2) / visible.sum(0)  # (B, H, S)
    few = received[..., : min(32, length // 2)].mean(0)
    at_sink = np.take_along_axis(received, few.argmax(-1)[None, :, None], axis=-1)[..., 0]  # (B, H)
    half = received[..., : length // 2]
    uniform = visible[:, 0] / visible.sum(1)
    norms = call["value"].norm(dim=-1)
    block = call["block"].numpy()
    centred = block - block.mean((1, 2), keepdims=True)
    size = call["heads"].abs().numpy()
    share, values = few.max(-1), naive_values_at(few.argmax(-1), norms)
    updates = naive_updates(call["heads"])
    squares = torch.linalg.svdvals(call["heads"].transpose(1, 2)).square()
    ranks = (squares.sum(-1) / squares[..., 0]).numpy()
    return {
        "f_attn": weights[:, :, 1:, 0].mean((0, 2)),
        "f_attn_late": weights[:, :, 4:, 0].mean((0, 2)),
        "f_attn_start": weights[starts][:, :, 1:, 0].mean((0, 2)),
        "f_attn_middle": weights[~starts][:, :, 1:, 0].mean((0, 2)),
        "f_attn_uniform": uniform[1:].mean(),
        "f_attn_late_uniform": uniform[4:].mean(),
        "sink_rate": (received[..., 0] > 0.3).mean(0),
        "sink_position": few.argmax(-1),
        "sink_share": share,
        "sink_value": values.mean(0),
        **updates,
        "no_op_sink": ((at_sink > 0.3) & (values <= 0.2)).mean(0),
        "broadcast_sink": ((at_sink > 0.3) & (values >= 0.5) & (ranks <= 1.5)).mean(0),
        "peak": half.max(-1).mean(0),
        "peak_elsewhere": (half.argmax(-1) != 0).mean(0),
        "entropy": call["entropy"].numpy().mean(0),
        "entropy_uniform": np.log(visible.sum(1)).mean(),
        "value_drain": (norms[..., 0] / norms[..., 1:].median(-1).values).mean(0).numpy(),
        "inf_norm": np.abs(block).max((1, 2)).mean(),
        "kurtosis": ((centred**4).mean((1, 2)) / (centred**2).mean((1, 2)) ** 2).mean(),
        "size_before_gate": call["out"].abs().numpy().mean((0, 1, 3)),
        "size_after_gate": size.mean((0, 1, 3)),
        "sparsity_1e-2": (size < 1e-2).mean((0, 1, 3)),
        "sparsity_1e-3": (size < 1e-3).mean((0, 1, 3)),
    }


def naive_values_at(positions, norms):
    """Of each sequence and query head: norm of the value at its position over the median norm."""
    ratios = (norms / norms.median(-1, keepdim=True).values).numpy()
    heads_per_value = len(positions) // ratios.shape[1]
    return np.stack([ratios[:, head // heads_per_value, place] for head, place in enumerate(positions)], axis=1)


def naive_updates(heads):
    """Of each head, from the singular values of its outputs; the sequences are shorter than 256 tokens."""
    outputs = heads.transpose(1, 2)  # (B, H, T, D)
    squares = torch.linalg.svdvals(outputs).square()
    constant = outputs.mean(2, keepdim=True).expand_as(outputs).square().sum((2, 3)) / squares.sum(-1)
    rank = squares.sum(-1) / squares[..., 0]
    return {"update_rank": rank.mean(0).numpy(), "update_constant": constant.mean(0).numpy()}


def naive_of_layer(state):
    size = state.abs().flatten(1)
    top = size.sort(descending=True).values
    median = size.median(1).values  # the sequences are shorter than 64 tokens
    massive = state.abs() > torch.clamp(1000 * median, min=100)[:, None, None]
    return {
        "m_act": size.max().item(),
        "top_activations": top[:, :3].mean(0).numpy(),
        "median_activation": median.mean().item(),
        "massive_tokens": massive.any(-1).sum(1).double().mean().item(),
    }


def naive_scores(name, model, ids):
    """Gate scores by site and layer, (B, T, heads, channels), written out from the weights and the block's input."""
    inputs = {}
    hooks = []
    for index, layer in enumerate(model.get_decoder().layers):
        if (attention := attention_of(layer)) is not None:

            def keep(module, args, kwargs, index=index):
                inputs[index] = kwargs["hidden_states"]

            hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    scores = defaultdict(dict)
    for index, x in inputs.items():
        attention = attention_of(model.get_decoder().layers[index])
        if name in PACKED:
            packed = (x @ attention.q_proj.weight.T).unflatten(-1, (4, 2, 16))
            scores["sdpa"][index] = torch.sigmoid(packed[..., 1, :])
        elif name == "afmoe":
            scores["sdpa"][index] = torch.sigmoid((x @ attention.gate_proj.weight.T).unflatten(-1, (4, 16)))
        else:
            for spec in model.config.gates:
                scores[spec.site][index] = naive_scores_of(spec, attention, x)
    return scores


def naive_scores_of(spec, attention, x):
    projection = getattr(attention, {"sdpa": "g", "value": "v_g", "key": "k_g", "query": "q_g", "output": "o_g"}[
        spec.site] + "_proj")  # fmt: skip
    weight = projection.weight
    reads = torch.ones_like(x[..., :1]) if spec.input == "parameter" else x[..., : spec.input_dim]
    logits = reads @ weight.T
    if projection.bias is not None:
        logits = logits + projection.bias
    scores = torch.sigmoid(logits) * (logits if spec.activation == "silu" else 1.0) * spec.scale
    width = 1 if spec.granularity == "headwise" else x.shape[-1] if spec.site == "output" else attention.head_dim
    scores = scores.unflatten(-1, (-1, width))
    return scores.mean(2, keepdim=True) if spec.head_shared else scores


def quantile_of_bins(counts, edges, share):
    """The first value at which that share is reached, bins filled evenly."""
    left = share * counts.sum()
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count >= left and count > 0:
            return low + (high - low) * left / count
        left -= count
    raise AssertionError("the counts do not reach the share")
