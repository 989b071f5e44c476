"""What every checkpoint becomes on the way in and starts from on the way out: this package's own layout, unread."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert.storage import Stored

Config = GatedQwen3Config | GatedQwen3MoeConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as this package names and shapes it; experts one by one, as Qwen3-MoE's checkpoints hold them.

    Attributes:
        origin: What it was, in words.
        left_out: Tensors of the source that have no place in the model, such as heads that predict several tokens.
    """

    config: Config
    tensors: dict[str, Stored]
    origin: str
    left_out: tuple[str, ...] = ()


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this configuration, in the model's order."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"describes no model that can be built ({one_line(error)}); fetch it again") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, shape in split_experts(name, tuple(tensor.shape)):
            shapes[part] = shape
    return shapes


def one_line(error: Exception) -> str:
    """An error of a library as part of one line: its kind and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def split_experts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the single experts' weights in a fused tensor; the tensor itself if it is none."""
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return [(name, shape)]
    experts, rows, columns = shape
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    part = (rows // len(kinds), columns)
    return [(f"{prefix}.{index}.{one}.weight", part) for index in range(experts) for one in kinds]


def check_complete(checkpoint: Checkpoint, weights: Path) -> Checkpoint:
    """The checkpoint in the model's order, a tied head dropped.

    Args:
        weights: The file that should hold every tensor, or the index of the files that do.

    Raises:
        ValueError: if a tensor is missing, unknown, wrongly shaped, or tied but different.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        _drop_tied_head(tensors)
    expected = expected_shapes(checkpoint.config)
    faults = list(_faults(tensors, expected, weights))
    if faults:
        rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + rest)
    return Checkpoint(
        checkpoint.config, {name: tensors[name] for name in expected}, checkpoint.origin, checkpoint.left_out
    )


def _faults(tensors: dict[str, Stored], expected: dict[str, tuple[int, ...]], weights: Path) -> Iterable[str]:
    for name, shape in expected.items():
        if name not in tensors:
            yield f"tensor {name} is missing from {weights}; config.json asks for one of shape {list(shape)}"
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            yield f"tensor {name} of {tensors[name].origin} has shape {found}; config.json asks for {list(shape)}"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"tensor {name} of {tensor.origin} is unknown; this architecture has no such weight"


def _drop_tied_head(tensors: dict[str, Stored]) -> None:
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not torch.equal(head.load(), embedding.load()):
        raise ValueError(
            f"tensor lm_head.weight of {head.origin} differs from the embedding that config.json ties it to; "
            "set tie_word_embeddings to false"
        )
