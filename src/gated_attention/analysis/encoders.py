"""Models whose attention looks both ways: their layers, and what each of their positions is."""

from collections.abc import Mapping
from inspect import signature
from typing import Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from gated_attention.models.families.layouts import Attention, calls_interface, find_attention

PositionKind = Literal["cls", "register", "sep", "content"]
"""What a position holds: a class token, a register, a separator that ends a text, or a part of what is read."""

CONTENT = {"input_ids": "token", "pixel_values": "patch", "input_features": "frame", "input_values": "frame"}
"""What a position of kind `content` is called, by the name of the model's input."""


def encoder_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a model that looks both ways: the whole model, or its encoder; None for a causal model.

    Raises:
        ValueError: if it has several.
    """
    if model.config.is_encoder_decoder:
        return cast(PreTrainedModel, model.get_encoder())
    base: PreTrainedModel = model.base_model
    if not CONTENT.keys() & signature(base.forward).parameters.keys():  # DINOv3's reads embeddings
        base = model
    attention = [module for module in base.modules() if calls_interface(type(module))]  # type: ignore[arg-type]
    if not attention or any(getattr(module, "is_causal", True) for module in attention):
        return None
    if len(parts := getattr(base.config, "sub_configs", {})) > 1:
        raise ValueError(
            f"{type(model).__name__} has several encoders ({', '.join(parts)}); give one of them, e.g. its "
            "vision_model, as a model of its own"
        )
    return base


def encoder_layers(encoder: PreTrainedModel) -> list[tuple[nn.Module, Attention]]:
    """Each layer and its attention, in order.

    Raises:
        ValueError: as `models.families.layouts.find_attention`.
    """
    found = []
    for one in find_attention(encoder):
        parts = one.name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found.append((encoder.get_submodule(".".join(parts[: number + 1])), one))
    return found


def image_positions(model: PreTrainedModel, pixels: Tensor, length: int) -> tuple[PositionKind, ...]:
    """What each position of a vision transformer is: class tokens, then registers, then patches, row by row.

    Args:
        pixels: Images, (B, channels, height, width).
        length: Positions of the model's attention.
    """
    columns, rows = patch_grid(model, pixels)
    registers = int(getattr(model.config, "num_register_tokens", 0))
    if getattr(model.config, "mask_ratio", 0):
        raise ValueError(
            f"{type(model).__name__} reads a random part of the patches; set mask_ratio to 0 in its configuration"
        )
    special = length - rows * columns
    if special < registers:  # the model pools patches
        special, registers = 0, 0
    kinds: list[PositionKind] = ["cls"] * (special - registers)
    kinds += ["register"] * registers
    kinds += ["content"] * (length - len(kinds))
    return tuple(kinds)


def patch_grid(model: PreTrainedModel, pixels: Tensor) -> tuple[int, int]:
    """Columns and rows of patches."""
    size = model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return pixels.shape[3] // width, pixels.shape[2] // height


def input_name(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> str:
    """The name of the input whose parts are the model's positions.

    Raises:
        ValueError: if there is none.
    """
    name = next((name for name in inputs if name in CONTENT), None)
    if name is None:
        raise ValueError(f"{type(model).__name__} was given {', '.join(inputs)}; give one of {', '.join(CONTENT)}")
    return name
