"""Configurations of a study's models: decoders in any architecture of the registry, and vision transformers."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from transformers import PreTrainedConfig, ViTConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.models.families.add_gates import register
from gated_attention.models.modeling_register_vit import RegisterViTConfig
from gated_attention.registry.architectures import Architecture
from gated_attention.sizes import ModelSize
from gated_attention.spec import BlockSpec


def architecture_config(
    architecture: Architecture, size: ModelSize, block: BlockSpec, rope_theta: float | None = None, **overrides: Any
) -> PreTrainedConfig:
    """The configuration of a size with this block in every layer.

    Without gates it is the family's own, so that the saved model is a plain one.

    Args:
        size: As `Architecture.fit` gives it.
        rope_theta: None is the size's.
        overrides: Fields of the configuration, by Qwen3's names.
    """
    theta = size.rope_theta if rope_theta is None else rope_theta
    if architecture.is_own:
        return make_config(size, block, rope_parameters={"rope_type": "default", "rope_theta": theta}, **overrides)
    values = {
        "num_hidden_layers": size.num_hidden_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "intermediate_size": size.intermediate_size,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": size.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # else the row of that token would stay zero
        **overrides,
    }
    if architecture.shares_keys:
        values |= {"num_key_value_heads": size.num_key_value_heads, "head_dim": size.head_dim}
    if architecture.rope_fraction is not None:
        rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": architecture.rope_fraction}
        values["rope_parameters"] = rope
    values |= _windows(architecture, size, values["max_position_embeddings"])
    values |= {field: getattr(size, source) for field, source in architecture.copied} | dict(architecture.fixed)
    for own, theirs in architecture.renamed:
        values[theirs] = values.pop(own)
    base = CONFIG_MAPPING[architecture.model_type]
    plain: PreTrainedConfig = base(**values) if not block.gates else register(base)(**values, gates=block.gates)
    return plain


def vision_config(
    size: ModelSize, block: BlockSpec, registers: int, *, image_size: int, labels: Sequence[str]
) -> PreTrainedConfig:
    """The configuration of a vision transformer of a size, with this block in every layer.

    Without gates and registers it is transformers' own.

    Args:
        image_size: Height and width; the size's context is the number of patches, a square.
        labels: Names of the classes.
    """
    values = {
        "num_hidden_layers": size.num_hidden_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "intermediate_size": size.intermediate_size,
        "image_size": image_size,
        "patch_size": image_size // isqrt(size.context),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        **({"num_register_tokens": registers} if registers else {}),
    }
    base = RegisterViTConfig if registers else ViTConfig
    plain: PreTrainedConfig = base(**values) if not block.gates else register(base)(**values, gates=block.gates)
    return plain


def _windows(architecture: Architecture, size: ModelSize, context: int) -> dict[str, Any]:
    windows = architecture.windows
    if windows is None:
        return {}
    found: dict[str, Any] = {"sliding_window": max(1, context // windows.divisor)}
    if windows.full_every:
        layers = size.num_hidden_layers
        full = {*range(windows.full_every - 1, layers, windows.full_every), layers - 1}
        found["layer_types"] = [f"{'full' if i in full else 'sliding'}_attention" for i in range(layers)]
    return found
