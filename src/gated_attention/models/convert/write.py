"""Write checkpoints: a gated model as a stock architecture, Qwen3-Next or Qwen3.5, that servers know."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3MoeConfig
from gated_attention.models.convert.canonical import EMBEDDING, HEAD, Checkpoint, Config
from gated_attention.models.convert.layouts import join_per_head
from gated_attention.models.convert.read import HINT, HINTS, model_dtype, shifted
from gated_attention.models.convert.stand_ins import append_idle_layer, as_one_expert, zero_shared_expert
from gated_attention.models.convert.storage import Stored, Tensors
from gated_attention.spec import BlockSpec

_CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_CARRIED_MOE = (
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits",
    "router_aux_loss_coef", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip

# What the architectures express in one way only: they have no field for it.
_ONLY_BLOCK = {field.name: getattr(BlockSpec(), field.name) for field in fields(BlockSpec) if field.name != "gates"}
_ONLY_GATE = {
    "combine": "multiply", "activation": "sigmoid", "input": "hidden_state", "scale": 1.0,
    "head_shared": False, "input_dim": None, "bias": None,
}  # fmt: skip
_ONLY_QWEN3_5_MOE = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_ONE_EXPERT = _ONLY_QWEN3_5_MOE | {"num_experts": 1, "num_experts_per_tok": 1}


def export(checkpoint: Checkpoint, to: str) -> tuple[PreTrainedConfig, Tensors]:
    """Configuration and tensors of the stock architecture, whose logits are the gated model's.

    Raises:
        ValueError: if that architecture cannot express the model; names the reason.
    """
    config = checkpoint.config
    _check_expressible(config, to)
    is_moe = isinstance(config, GatedQwen3MoeConfig)
    dtype = model_dtype(checkpoint.tensors)
    tensors: Tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = shifted(tensor, -1.0, dtype)
        elif name.endswith(".self_attn.q_proj.weight"):
            gate = checkpoint.tensors[name.replace(".q_proj.", ".g_proj.")]
            shape = (2 * tensor.shape[0], tensor.shape[1])
            tensors[name] = Stored(shape, tensor.dtype, partial(_join, tensor, gate, config), tensor.origin)
        elif not name.endswith(".self_attn.g_proj.weight"):
            tensors[name] = tensor
            if is_moe and name.endswith(".mlp.gate.weight"):
                tensors |= zero_shared_expert(name.removesuffix(".gate.weight"), tensor)
    stock = _stock_config(config, to)
    if to == "qwen3_next":
        tensors = tensors if is_moe else as_one_expert(tensors)
        if config.tie_word_embeddings:
            tensors[HEAD] = tensors[EMBEDDING]
    if to == "llama_cpp":
        tensors |= append_idle_layer(stock, dtype)
    return stock, tensors


def _check_expressible(config: Config, to: str) -> None:
    cure = "convert with --to gated"
    _require_only(to, "", config, _ONLY_BLOCK, cure)
    if len(config.gates) != 1 or config.gates[0].site != "sdpa":
        gates = " + ".join(gate.describe() for gate in config.gates) or "no gate"
        raise ValueError(f"{to} has exactly one gate, G1, and this model has {gates}; {cure}")
    _require_only(to, "a gate with ", config.gates[0], _ONLY_GATE, cure)
    if config.attention_bias:
        raise ValueError(f"{to} would give the gate a bias too where attention_bias is true; {cure}")
    _require_only(to, "", config, {"sliding_window": None}, cure)
    if to != "qwen3_next" and isinstance(config, GatedQwen3MoeConfig):
        _require_only(to, "", config, _ONLY_QWEN3_5_MOE, "use --to qwen3_next")


def _require_only(to: str, what: str, holder: object, only: Mapping[str, Any], cure: str) -> None:
    """Refuse a field that has another value than the only one that the architecture can express."""
    for name, value in only.items():
        if (found := getattr(holder, name, value)) != value:
            raise ValueError(f"{to} cannot express {what}{name}={found!r}; {cure}")


def _stock_config(config: Config, to: str) -> PreTrainedConfig:
    is_moe, is_next = isinstance(config, GatedQwen3MoeConfig), to == "qwen3_next"
    carried = _CARRIED + _CARRIED_MOE if is_moe else _CARRIED
    values = {name: getattr(config, name) for name in carried if is_next or name not in _ONLY_QWEN3_5_MOE}
    hint = {name: getattr(config.gates[0], name) for name in HINTS}
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    values |= {
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "full_attention_interval": 1,  # read by mlx-lm and SGLang, which do not read layer_types
        "rope_parameters": rope,
        "attn_output_gate": True,  # read by vLLM and SGLang
        HINT: hint,
    }
    if is_moe or is_next:
        values["shared_expert_intermediate_size"] = 1
    if is_next:
        if config.tie_word_embeddings:  # vLLM never ties the head of this architecture
            values["tie_word_embeddings"] = False
            hint["tie_word_embeddings"] = True
        if not is_moe:  # vLLM has no dense layer of this architecture
            values |= _ONE_EXPERT | {"moe_intermediate_size": config.intermediate_size}
            hint["dense"] = True
        return Qwen3NextConfig(**values)
    # Text has the same position on all three axes. llama.cpp gives channel i to axis i % 3 as far as the section of
    # that axis reaches, and rotates channels beyond it by a fourth position, which is 0.
    half = config.head_dim // 2
    rope |= {"mrope_section": [(half + 2) // 3, (half + 1) // 3, half // 3], "mrope_interleaved": True}
    return (Qwen3_5MoeTextConfig if is_moe else Qwen3_5TextConfig)(**values)


def _join(q: Stored, g: Stored, config: Config) -> Tensor:
    return join_per_head(q.load(), g.load(), config.geometry)
