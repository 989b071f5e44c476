"""Add gates to a model of any family of transformers: its own tensors as they are stored, and those of the gates."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedModel

from gated_attention.models.attention import initial_std
from gated_attention.models.convert.read import check_unquantised
from gated_attention.models.convert.retrofit import initial_gates, initial_weight
from gated_attention.models.convert.storage import Stored, Tensors, open_checkpoint, read_json
from gated_attention.models.families.add_gates import add_gates
from gated_attention.models.families.configuration import PREFIX
from gated_attention.models.families.layouts import AttentionKind
from gated_attention.ranges import consecutive_runs, require_within
from gated_attention.spec import GateSpec, Init

MOST_LAYERS = 10_000
"""More than any model has."""


@dataclass(frozen=True, slots=True)
class GatedFamily:
    """A model with gates, ready to be written.

    Attributes:
        kind: The class of the model without gates.
        config: With the gates.
        generation: The generation settings; None for a model that does not generate.
    """

    kind: type[PreTrainedModel]
    config: Any
    tensors: Tensors
    num_parameters: int
    num_added: int
    generation: Any


def gate_family(
    folder: Path, gates: tuple[GateSpec, ...], init: Init, layers: list[int] | str | None, attention: AttentionKind
) -> GatedFamily:
    """The model of a folder with gates. It is loaded whole by its own class, so that nothing is missing or left over.

    Raises:
        ValueError: if the class is not one of transformers, or is not the configuration's; if the model has gates
            already, cannot be loaded whole, or does not fit the gates.
    """
    from gated_attention.models.saved.loading import load_model  # which imports this folder

    path = folder / "config.json"
    content = read_json(path)
    if str(content.get("model_type")).startswith(PREFIX):
        raise ValueError(
            f"the model has gates already (model_type {content['model_type']!r}); --add-gate is for models without one"
        )
    check_unquantised(content, path)
    specs = initial_gates(gates, init)
    kind = _model_class(content, path)
    model = load_model(kind, folder, dtype="auto")
    known = set(model.state_dict())
    num_parameters = model.num_parameters()
    add_gates(model, specs, layers, attention)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    std = 0.0 if init == "zeros" else initial_std(config)
    tensors = open_checkpoint(folder)
    for name, tensor in model.state_dict().items():
        if name in known:
            continue
        load = partial(initial_weight, name, tuple(tensor.shape), tensor.dtype, std)
        # A bias is initialised as its gate's spec says, by a constant.
        tensors[name] = Stored(
            tuple(tensor.shape), tensor.dtype, load if name.endswith(".weight") else tensor.clone, "new"
        )
    return GatedFamily(
        kind=kind,
        config=config,
        tensors=tensors,
        num_parameters=model.num_parameters(),
        num_added=model.num_parameters() - num_parameters,
        generation=model.generation_config if model.can_generate() else None,
    )


def _model_class(content: dict[str, Any], path: Path) -> type[PreTrainedModel]:
    names = content.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    config_class: Any = getattr(kind, "config_class", None)
    if not is_model or config_class is None:
        raise ValueError(
            f"{path} names the architecture {name!r}, which transformers does not have; "
            "gates are added to transformers' own classes, e.g. LlamaForCausalLM"
        )
    if (expected := config_class.model_type) != (found := content.get("model_type")):
        raise ValueError(
            f"{path} has model_type {found!r} and architecture {name}, which is a {expected}; fetch it again"
        )
    return cast(type[PreTrainedModel], kind)


def describe_place(config: Any) -> str:
    """The attention that has gates, e.g. `self-attention of layers 0-3, 7`."""
    kind = "" if config.gated_attention == "all" else f"{config.gated_attention}-"
    layers = config.gated_layers
    if layers is None:
        return f"{kind}attention of all layers"
    return f"{kind}attention of layer{'s' if len(layers) > 1 else ''} {consecutive_runs(layers, '-')}"


def parse_layers(text: str | None) -> list[int] | str | None:
    """Layers from what a caller writes: indices such as `0-3,7`, or a layer type such as `full_attention`.

    Raises:
        ValueError: if it starts as indices do and is none.
    """
    if text is None:
        return None
    text = text.strip()
    if text[:1].isalpha():
        return text
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))):
            raise ValueError(f"--layers is {text!r}; give indices, e.g. 0-3,7, or a layer type, e.g. full_attention")
        require_within("--layers", int(last or first), below=MOST_LAYERS)
        layers.extend(range(int(first), int(last or first) + 1))
    return layers
