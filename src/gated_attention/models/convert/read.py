"""Read checkpoints: recognise a model folder by its configuration and tensors, and map it to this package's layout."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert.canonical import (
    EMBEDDING,
    Checkpoint,
    Config,
    check_complete,
    error_line,
    split_experts,
)
from gated_attention.models.convert.layouts import merge_rows, shift_exactly, split_per_group, split_per_head
from gated_attention.models.convert.stand_ins import drop_idle_layer, drop_zero_shared_experts, from_one_expert, is_tied
from gated_attention.models.convert.storage import (
    Stored,
    Tensors,
    check_floating,
    find_weights,
    open_checkpoint,
    read_json,
)
from gated_attention.spec import GateSpec, Granularity, ScoreDtype

Split = Callable[[Tensor], tuple[Tensor, Tensor]]

HINT = "gated_attention"
"""Key of an exported configuration that describes the gate: a headwise one, repeated, looks elementwise."""

HINTS = ("granularity", "dtype", "init")
"""Fields of the hint: properties of a gate that the stock architecture cannot state."""

_GATE_NAMES: dict[str, ScoreDtype] = {"g_proj": "model", "gate_proj": "model", "w_g": "float32"}
"""Separate gates of Step; AFMoE; OLMo-core, which computes scores in float32."""
_RELEASE_FLAGS: dict[str, Granularity] = {
    "headwise_attn_output_gate": "headwise",
    "elementwise_attn_output_gate": "elementwise",
}
_RELEASE_HEAD_DIM = 128  # the default of its configuration class
_LEGACY_KEYS = {"rope_theta", "rope_scaling", "dtype", "torch_dtype", "num_experts", "num_local_experts"}
_NOT_CARRIED = {"architectures", "auto_map", "model_type", "transformers_version", "gates"}


def read_model(folder: Path) -> Checkpoint:
    """A model folder in this package's layout; weights are read only to check what must be tied or zero.

    Raises:
        ValueError: if the architecture is not one of `_READERS`, or the folder is damaged; names tensor and file.
    """
    path = folder / "config.json"
    content = read_json(path)
    if content.get("vision_config") is not None:
        raise ValueError(f"{folder} holds a vision model, which cannot be converted; give a text-only checkpoint")
    check_unquantised(content, path)
    if isinstance(nested := content.get("text_config"), dict):
        content = {**{key: content[key] for key in ("tie_word_embeddings", "dtype", HINT) if key in content}, **nested}
    model_type = str(content.get("model_type"))
    if model_type not in _READERS:
        raise ValueError(
            f"model_type {model_type!r} of {folder} is not readable; choose from {', '.join(_READERS)}, "
            "or give another model gates with --add-gate"
        )
    tensors: Tensors = {}
    left_out = []
    for stored_name, tensor in open_checkpoint(folder).items():
        name = stored_name.replace("model.language_model.", "model.", 1)
        if name.startswith(("model.visual.", "visual.")):
            raise ValueError(f"tensor {name} of {tensor.origin} is of a vision model; give a text-only checkpoint")
        if name.startswith("mtp.") or name.endswith("rotary_emb.inv_freq"):
            left_out.append(name)
        else:
            check_floating(name, tensor)
            tensors[name] = tensor
    try:
        config, tensors, origin = _READERS[model_type](content, _split_fused_experts(tensors))
        return check_complete(Checkpoint(config, tensors, origin, tuple(left_out)), find_weights(folder))
    except (KeyError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ValueError(
            f"{path} is no configuration of a {model_type} ({error_line(error)}); fetch it again"
        ) from error
    except ValueError as error:
        if str(folder) in str(error):  # about a tensor: it names the file already
            raise
        raise ValueError(f"{path}: {error}") from error


def is_qwen3(folder: Path) -> bool:
    """Whether a folder is for `read_model`: Qwen3, or what is read as one; a Qwen2 is not, the paper's release is."""
    content = read_json(folder / "config.json")
    if content.get("vision_config") is not None:
        return False
    nested = content.get("text_config")
    content = nested if isinstance(nested, dict) else content
    model_type = content.get("model_type")
    return str(model_type) in _READERS and (model_type != "qwen2" or any(flag in content for flag in _RELEASE_FLAGS))


def check_unquantised(content: dict[str, Any], path: Path) -> None:
    """Refuse the configuration, read from `path`, of a quantised model."""
    if content.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config; give the checkpoint that was quantised")


def _read_own(content: dict[str, Any], tensors: Tensors) -> tuple[Config, Tensors, str]:
    return _own_config(content, _is_moe(content), content.get("gates", ())), tensors, "gated_attention"


def _read_qwen3(content: dict[str, Any], tensors: Tensors) -> tuple[Config, Tensors, str]:
    config = _own_config(content, _is_moe(content), ())
    origin = "Qwen3-MoE" if _is_moe(content) else "Qwen3"
    for name, dtype in _GATE_NAMES.items():
        # The first layer tells; `check_complete` compares the others tensor by tensor.
        if gate := tensors.get(f"model.layers.0.self_attn.{name}.weight"):
            is_headwise = gate.shape[0] == config.num_attention_heads
            config.gates = (GateSpec(granularity="headwise" if is_headwise else "elementwise", dtype=dtype),)
            renamed = {key.replace(f".self_attn.{name}.", ".self_attn.g_proj."): tensors[key] for key in tensors}
            return config, renamed, f"{origin} with a separate gate, {name}"
    return config, tensors, origin


def _read_release(content: dict[str, Any], tensors: Tensors) -> tuple[Config, Tensors, str]:
    for flag in _RELEASE_FLAGS:
        if flag not in content:
            raise ValueError(f"model_type is 'qwen2' without {flag}, so not the paper's release; give that, or a Qwen3")
    if not content.get("use_qk_norm", True) or content.get("qkv_bias", False):
        raise ValueError("use_qk_norm must be true and qkv_bias false; Qwen3 has QK-norm and no such bias")
    granularities = [granularity for flag, granularity in _RELEASE_FLAGS.items() if content[flag]]
    if len(granularities) > 1:
        raise ValueError(f"{' and '.join(_RELEASE_FLAGS)} are both true; set at most one")
    gates = tuple(GateSpec(granularity=granularity, dtype="model") for granularity in granularities)
    values = {"head_dim": _RELEASE_HEAD_DIM, **content, "attention_bias": False}
    config = _own_config(values, False, gates)
    if not gates:
        return config, tensors, "the paper's release, baseline"
    _, gate_rows = gates[0].score_shape(config.geometry)
    split = partial(split_per_group, geometry=config.geometry, gate_rows=gate_rows)
    return config, _unpack(tensors, config, split, gate_rows), f"the paper's release, {granularities[0]}"


def _read_stock(content: dict[str, Any], tensors: Tensors) -> tuple[Config, Tensors, str]:
    stock = AutoConfig.for_model(**content)
    if stock.layer_types[-1:] == ["linear_attention"] and "full_attention" in stock.layer_types:
        stock.num_hidden_layers, stock.layer_types = stock.num_hidden_layers - 1, stock.layer_types[:-1]
        tensors = drop_idle_layer(tensors, stock.num_hidden_layers)
    if any(kind != "full_attention" for kind in stock.layer_types):
        raise ValueError(
            f"layer_types of {stock.model_type} has linear attention; only full attention can be converted"
        )
    if stock.attention_bias:
        raise ValueError("attention_bias is true, which packs a gate bias; only checkpoints without it are read")
    rope = dict(stock.rope_parameters)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1.0; Qwen3 rotates every channel of a head")
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    hint = content.get(HINT) or {}
    gate = GateSpec(**{"dtype": "model", **{name: hint[name] for name in HINTS if name in hint}})
    values = {**stock.to_dict(), "rope_parameters": rope}
    if hint.get("tie_word_embeddings") and is_tied(tensors):
        values["tie_word_embeddings"] = True
    tensors = drop_zero_shared_experts(tensors)
    moe = _has_experts(stock)
    if moe and stock.num_experts == 1 and hint.get("dense"):
        moe, tensors = False, from_one_expert(tensors)
    if stock.model_type == "qwen3_5_moe_text":
        values["norm_topk_prob"] = True  # that class always normalises
    config = _own_config(values, moe, (gate,))
    dtype = model_dtype(tensors)
    tensors = {
        name: shifted(tensor, 1.0, dtype) if name.endswith("norm.weight") else tensor
        for name, tensor in tensors.items()
    }

    def split(packed: Tensor) -> tuple[Tensor, Tensor]:
        q, g = split_per_head(packed, config.geometry)
        return q, merge_rows(g, config.geometry) if gate.granularity == "headwise" else g

    unpacked = _unpack(tensors, config, split, config.head_dim)
    return config, unpacked, f"{stock.model_type} ({gate.granularity} gate)"


_READERS: dict[str, Callable[[dict[str, Any], Tensors], tuple[Config, Tensors, str]]] = {
    "gated_qwen3": _read_own,
    "gated_qwen3_moe": _read_own,
    "qwen2": _read_release,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3,
    "qwen3_next": _read_stock,
    "qwen3_5_text": _read_stock,
    "qwen3_5_moe_text": _read_stock,
}


def _is_moe(content: dict[str, Any]) -> bool:
    return str(content["model_type"]).endswith("moe")


def _has_experts(stock: Any) -> bool:
    if stock.model_type == "qwen3_5_moe_text":
        return True
    return bool(getattr(stock, "num_experts", 0)) and any(
        index not in stock.mlp_only_layers and (index + 1) % stock.decoder_sparse_step == 0
        for index in range(stock.num_hidden_layers)
    )


def _own_config(content: dict[str, Any], moe: bool, gates: Any) -> Config:
    own = GatedQwen3MoeConfig if moe else GatedQwen3Config
    known = (set(own().to_dict()) | _LEGACY_KEYS) - _NOT_CARRIED
    if not moe:
        known -= {"num_experts", "num_local_experts"}
    config: Config = own(gates=gates, **{key: value for key, value in content.items() if key in known})
    return config


def _unpack(tensors: Tensors, config: Config, split: Split, packed_rows: int) -> Tensors:
    """Every `q_proj` split into queries and gate; `packed_rows` is the number of gate rows per head before that."""
    (gate,), heads, width = config.gates, config.num_attention_heads, config.hidden_size
    _, gate_rows = gate.score_shape(config.geometry)
    shape = (heads * (config.head_dim + packed_rows), width)
    unpacked: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(".self_attn.q_proj.weight"):
            unpacked[name] = tensor
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"tensor {name} of {tensor.origin} has shape {list(tensor.shape)}; "
                f"config.json asks for {list(shape)}, queries and gate"
            )
        rows = {name: config.head_dim, name.replace(".q_proj.", ".g_proj."): gate_rows}
        for part, new in enumerate(rows):
            load = partial(_load_part, tensor, split, part)
            unpacked[new] = Stored((heads * rows[new], width), tensor.dtype, load, tensor.origin)
    return unpacked


def _load_part(tensor: Stored, split: Split, part: int) -> Tensor:
    try:
        return split(tensor.load())[part]
    except ValueError as error:
        raise ValueError(f"a packed gate of {tensor.origin} does not agree with config.json: {error}") from error


def shifted(tensor: Stored, by: float, dtype: torch.dtype) -> Stored:
    """A norm between Qwen3's convention and the zero-centred one, exact; it is read at once, since norms are small."""
    weight = shift_exactly(tensor.load(), by, dtype)
    return Stored(tensor.shape, weight.dtype, lambda: weight, tensor.origin)


def model_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of the embedding, which stands for the model's."""
    return tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32


def _split_fused_experts(tensors: Tensors) -> Tensors:
    split: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")) or len(tensor.shape) != 3:
            split[name] = tensor
            continue
        for part, shape in split_experts(name, tensor.shape).items():
            split[part] = Stored(shape, tensor.dtype, partial(_load_expert, tensor, part, shape[0]), tensor.origin)
    return split


@lru_cache(maxsize=1)  # the experts of one fused tensor are loaded one after the other
def _load_whole(tensor: Stored) -> Tensor:
    return tensor.load()


def _load_expert(fused: Stored, part: str, rows: int) -> Tensor:
    *_, index, kind, _ = part.split(".")
    start = rows if kind == "up_proj" else 0
    return _load_whole(fused)[int(index), start : start + rows].clone()
