"""Checkpoints out: a gated model as a stock architecture, Qwen3-Next or Qwen3.5, that servers know."""

from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3MoeConfig
from gated_attention.models.convert.canonical import Checkpoint, Config
from gated_attention.models.convert.layouts import join_per_head
from gated_attention.models.convert.read import HINT, HINTS, model_dtype, shifted
from gated_attention.models.convert.stand_ins import (
    IDLE_LAYER,
    as_one_expert,
    head_of_its_own,
    idle_layer,
    zero_shared_expert,
)
from gated_attention.models.convert.storage import Stored
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
_ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True, "decoder_sparse_step": 1,
              "mlp_only_layers": []}  # fmt: skip
_ONLY_GATES = {"combine": "multiply", "activation": "sigmoid", "input": "hidden_state", "scale": 1.0}


def export(checkpoint: Checkpoint, to: str) -> tuple[PreTrainedConfig, dict[str, Stored]]:
    """Configuration and tensors of the stock architecture; logits are the gated model's.

    Raises:
        ValueError: if that architecture cannot express the model; names the reason.
    """
    config = checkpoint.config
    _check_expressible(config, to)
    is_moe = isinstance(config, GatedQwen3MoeConfig)
    dtype = model_dtype(checkpoint.tensors)
    tensors: dict[str, Stored] = {}
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
    stock = _next_config(config) if to == "qwen3_next" else _qwen3_5_config(config)
    if to == "qwen3_next":
        tensors = tensors if is_moe else as_one_expert(tensors)
        if config.tie_word_embeddings:
            tensors = head_of_its_own(tensors)
    if to == "llama_cpp":
        _append_idle_layer(stock)
        tensors |= idle_layer(stock, dtype)
    stock.architectures = [_ARCHITECTURES[stock.model_type]]
    return stock, tensors


def top_level(stock: PreTrainedConfig) -> dict[str, Any]:
    """What mlx-lm and SGLang read at the top of config.json; transformers writes it in `rope_parameters` alone."""
    return {name: stock.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")}


def _append_idle_layer(stock: PreTrainedConfig) -> None:
    # llama.cpp keeps these models in a hybrid memory, which has to have a recurrent part.
    stock.num_hidden_layers += 1
    stock.layer_types = [*stock.layer_types, "linear_attention"]
    del stock.full_attention_interval  # none describes such a model
    for name, value in IDLE_LAYER.items():
        setattr(stock, name, value)


_ARCHITECTURES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}


def _check_expressible(config: Config, to: str) -> None:
    for name, value in foreign_fields(config).items():
        raise ValueError(f"{to} cannot express {name}={value!r}; convert with --to gated")
    if len(config.gates) != 1 or config.gates[0].site != "sdpa":
        gates = " + ".join(gate.describe() for gate in config.gates) or "no gate"
        raise ValueError(f"{to} has exactly one gate, G1, and this model has {gates}; convert with --to gated")
    gate = config.gates[0]
    refused = [name for name, only in _ONLY_GATES.items() if getattr(gate, name) != only]
    refused += [name for name in ("head_shared", "input_dim") if getattr(gate, name)]
    refused += ["bias"] if gate.bias is not None else []
    for name in refused:
        raise ValueError(f"{to} cannot express a gate with {name}={getattr(gate, name)!r}; convert with --to gated")
    if config.attention_bias:
        raise ValueError(f"{to} would give the gate a bias too where attention_bias is true; convert with --to gated")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{to} cannot express sliding_window={config.sliding_window}; convert with --to gated")
    if to != "qwen3_next" and isinstance(config, GatedQwen3MoeConfig):
        for name, only in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if getattr(config, name) != only:
                raise ValueError(f"{to} cannot express {name}={getattr(config, name)!r}; use --to qwen3_next")


def foreign_fields(config: Config) -> dict[str, Any]:
    """What a block carries besides gates, by field: nothing in a plain one."""
    plain, block = BlockSpec(), replace(config.block, gates=())
    return {
        field.name: getattr(block, field.name)
        for field in fields(block)
        if getattr(block, field.name) != getattr(plain, field.name)
    }


def _shared_values(config: Config) -> dict[str, Any]:
    return {
        **{name: getattr(config, name) for name in _CARRIED},
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "full_attention_interval": 1,  # read by mlx-lm and SGLang, which know no layer_types
        "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0},
        "attn_output_gate": True,  # read by vLLM and SGLang
        HINT: {name: getattr(config.gates[0], name) for name in HINTS},
    }


def _next_config(config: Config) -> PreTrainedConfig:
    values = _shared_values(config) | {"shared_expert_intermediate_size": 1}
    if config.tie_word_embeddings:  # vLLM never ties the head of this architecture
        values["tie_word_embeddings"] = False
        values[HINT]["tie_word_embeddings"] = True
    if isinstance(config, GatedQwen3MoeConfig):
        values |= {name: getattr(config, name) for name in _CARRIED_MOE}
    else:  # vLLM has no dense layer of this architecture
        values |= _ONE_EXPERT | {"moe_intermediate_size": config.intermediate_size}
        values[HINT]["dense"] = True
    return Qwen3NextConfig(**values)


def _qwen3_5_config(config: Config) -> PreTrainedConfig:
    values = _shared_values(config)
    half = config.head_dim // 2
    # Text has one position for all three axes. llama.cpp gives channel i to axis i % 3 as far as that axis' section
    # reaches, and rotates channels beyond it by a fourth position, which is 0.
    sections = [(half + 2) // 3, (half + 1) // 3, half // 3]
    values["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
    if not isinstance(config, GatedQwen3MoeConfig):
        return Qwen3_5TextConfig(**values)
    carried = [
        name for name in _CARRIED_MOE if name not in ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    ]
    values |= {name: getattr(config, name) for name in carried} | {"shared_expert_intermediate_size": 1}
    return Qwen3_5MoeTextConfig(**values)


def _join(q: Stored, g: Stored, config: Config) -> Tensor:
    return join_per_head(q.load(), g.load(), config.geometry)
