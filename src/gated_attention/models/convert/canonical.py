"""The form that every checkpoint takes between reading and writing: this package's names and layout, no weight read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert.storage import Tensors
from gated_attention.typed import one_line

Config = GatedQwen3Config | GatedQwen3MoeConfig
Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with this package's names and shapes; experts are separate, as in Qwen3-MoE's checkpoints.

    Attributes:
        origin: What the source was, in words.
        left_out: Tensors of the source that the model has no place for, such as multi-token prediction heads.
    """

    config: Config
    tensors: Tensors
    origin: str
    left_out: tuple[str, ...] = ()


def expected_shapes(config: PreTrainedConfig) -> dict[str, Shape]:
    """Name and shape of every tensor in a checkpoint of this configuration, in the model's order.

    Raises:
        ValueError: if no model can be built from it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"describes no model that can be built ({error_line(error)}); fetch it again") from error
    shapes: dict[str, Shape] = {}
    for name, tensor in model.state_dict().items():
        if name != HEAD or not config.tie_word_embeddings:
            shapes |= split_experts(name, tuple(tensor.shape))
    return shapes


def error_line(error: Exception) -> str:
    """The type and message of a library's error, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def split_experts(name: str, shape: Shape) -> dict[str, Shape]:
    """Names and shapes of the separate weights in a fused tensor of experts; any other tensor is returned alone."""
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return {name: shape}
    experts, rows, columns = shape
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    part = (rows // len(kinds), columns)
    return {f"{prefix}.{index}.{one}.weight": part for index in range(experts) for one in kinds}


def check_complete(checkpoint: Checkpoint, weights: Path) -> Checkpoint:
    """The checkpoint in the model's order, without a tied head.

    Args:
        weights: The file that should hold every tensor, or the index of the files that do.

    Raises:
        ValueError: if a tensor is missing, unknown, wrongly shaped, or tied but different.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        head = tensors.pop(HEAD, None)
        if head and EMBEDDING in tensors and not head.equals(tensors[EMBEDDING]):
            raise ValueError(
                f"tensor {HEAD} of {head.origin} differs from the embedding that config.json ties it to; "
                "set tie_word_embeddings to false"
            )
    expected = expected_shapes(checkpoint.config)
    if faults := list(_faults(tensors, expected, weights)):
        raise ValueError(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return replace(checkpoint, tensors={name: tensors[name] for name in expected})


def _faults(tensors: Tensors, expected: dict[str, Shape], weights: Path) -> Iterable[str]:
    for name, shape in expected.items():
        if name not in tensors:
            yield f"tensor {name} is missing from {weights}; config.json asks for one of shape {list(shape)}"
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            yield f"tensor {name} of {tensors[name].origin} has shape {found}; config.json asks for {list(shape)}"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"tensor {name} of {tensor.origin} is unknown; this architecture has no such weight"
