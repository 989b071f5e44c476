"""Convert one model folder into another: read, change the layout, write, all or nothing."""

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from gated_attention.files import new_folder, write_text
from gated_attention.models.convert.any_family import describe_place, gate_family
from gated_attention.models.convert.canonical import Checkpoint, error_line
from gated_attention.models.convert.read import is_qwen3, model_dtype, read_model
from gated_attention.models.convert.retrofit import WARNING, retrofit
from gated_attention.models.convert.source import check_adapter, check_links, find_source
from gated_attention.models.convert.storage import Tensors, is_weight_file, read_json, write_checkpoint
from gated_attention.models.convert.write import export
from gated_attention.models.families.layouts import AttentionKind
from gated_attention.models.saved.card import CARD_NAME, family_card, measured_sections, model_card
from gated_attention.models.saved.self_contained import write_self_contained
from gated_attention.ranges import require_choice, require_within
from gated_attention.spec import Gates, GateSpec, Init, as_gates

Target = Literal["gated", "qwen3_next", "qwen3_5", "llama_cpp"]
DEFAULT_SHARD_BYTES = 10**9
_SMALLEST_KNOWN_BPE = 32_000  # tokens; llama.cpp's converter knows none smaller


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        became: The new `model_type`.
        left_out: Tensors of the source that the model has no place for.
        widened: Number of norms stored in a wider dtype than the model's, which cannot represent `weight - 1`.
        place: The attention that was given gates, in words, where a family leaves the choice.
    """

    folder: Path
    origin: str
    became: str
    gates: tuple[GateSpec, ...]
    num_parameters: int
    num_bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    widened: int
    time_s: float
    warnings: tuple[str, ...] = ()
    place: str = ""

    def describe(self) -> list[str]:
        """The summary, line by line."""
        gates = " + ".join(gate.describe() for gate in self.gates) or "no gate"
        lines = [
            f"{self.origin} -> {self.became}: {gates}{f', in the {self.place}' if self.place else ''}",
            f"{self.num_parameters:,} parameters, {self.num_bytes / 1e9:.2f} GB, {self.time_s:.1f} s, in {self.folder}",
            f"files: {', '.join(self.files)}",
        ]
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} tensors, the first is {self.left_out[0]}")
        if self.widened:
            lines.append(f"{self.widened} norms are stored in float32: weight - 1 is not exact in the model's dtype")
        return lines + [f"note: {warning}" for warning in self.warnings]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What `convert` writes, and what it says of it; fields are those of `Conversion`."""

    config: Any
    tensors: Tensors
    card: str
    origin: str
    gates: tuple[GateSpec, ...]
    num_parameters: int
    left_out: tuple[str, ...] = ()
    widened: int = 0
    place: str = ""
    generation: Any = None


def convert(
    source: str | Path,
    target_folder: str | Path,
    to: Target = "gated",
    add_gate: Gates = None,
    init: Init = "zeros",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    self_contained: bool = False,
    layers: Iterable[int] | str | None = None,
    attention: AttentionKind = "all",
) -> Conversion:
    """Convert a checkpoint, tensor by tensor; nothing appears at `target_folder` unless everything succeeded.

    Args:
        source: A local folder, a hub name, or a folder inside a hub repository, `owner/repository/folder`.
        target_folder: Absent or empty.
        to: This package's layout, or the stock architecture to export to.
        add_gate: Gates for a model without one, of any family that `add_gates` knows.
        init: How to initialise added gates; `zeros` leaves the first forward pass unchanged.
        max_shard_bytes: Size beyond which weights are split over several files.
        self_contained: Whether the folder carries this package's modelling code, for readers without the package.
        layers: Where another family than Qwen3 gets gates, as in `add_gates`.
        attention: Of another family than Qwen3, as in `add_gates`.

    Raises:
        ValueError: if the source is damaged or unknown, or the target cannot express it; one line with the reason.
    """
    start = time.monotonic()
    require_choice("target", to, get_args(Target))
    require_within("max_shard_bytes", max_shard_bytes, least=1)
    require_choice("init", init, get_args(Init))
    require_choice("attention", attention, get_args(AttentionKind))
    gates = as_gates(add_gate)
    is_everywhere = layers is None and attention == "all"
    if init != "zeros" and not gates:
        raise ValueError(f"init {init!r} initialises added gates; name them with add_gate")
    if not is_everywhere and not gates:
        raise ValueError("layers and attention say where gates are added; name the gates with add_gate")
    if self_contained and to != "gated":
        raise ValueError("self_contained needs to='gated'; transformers itself has the code of the other targets")
    target_folder = Path(target_folder).expanduser()
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise ValueError(f"{target_folder} is not an empty folder; give one that is absent or empty")
    folder = find_source(source)
    check_adapter(folder)
    is_family = bool(gates) and not is_qwen3(folder)
    if is_family:
        _check_family(folder, to, self_contained)
        check_links(folder)
        chosen = layers if layers is None or isinstance(layers, str) else list(layers)
        ready = _prepare_family(str(source), folder, target_folder, gates, init, chosen, attention)
    elif is_everywhere:
        ready = _prepare_qwen3(str(source), folder, target_folder, to, gates, init)
    else:
        raise ValueError("a Qwen3 gets gates in all its layers; leave out --layers and --attention")
    try:
        with new_folder(target_folder) as part:
            for path in folder.iterdir():
                if path.is_file() and not is_weight_file(path) and not _is_rewritten(path):
                    shutil.copyfile(path, part / path.name)
            ready.config.save_pretrained(part)
            if ready.generation is not None and not (part / "generation_config.json").exists():
                ready.generation.save_pretrained(part)
            if to != "gated":
                # mlx-lm and SGLang read these at the top; transformers writes them in `rope_parameters` alone.
                at_top = {name: ready.config.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
                content = read_json(part / "config.json") | at_top
                write_text(part / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
            write_checkpoint(part, ready.tensors, max_shard_bytes)
            (part / CARD_NAME).write_text(ready.card, encoding="utf-8")
            if self_contained:
                write_self_contained(part)
            files = tuple(sorted(path.name for path in part.iterdir()))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target_folder} cannot be written ({error_line(error)}); nothing was left there") from error
    return Conversion(
        folder=target_folder,
        origin=ready.origin,
        became=ready.config.model_type,
        gates=ready.gates,
        num_parameters=ready.num_parameters,
        num_bytes=sum(tensor.num_bytes for tensor in ready.tensors.values()),
        files=files,
        left_out=ready.left_out,
        widened=ready.widened,
        time_s=time.monotonic() - start,
        warnings=((WARNING,) if gates else ()) + (_llama_cpp_warnings(folder) if to == "llama_cpp" else ()),
        place=ready.place,
    )


def _prepare_qwen3(
    source: str, folder: Path, target_folder: Path, to: Target, gates: tuple[GateSpec, ...], init: Init
) -> _Prepared:
    checkpoint = read_model(folder)
    check_links(folder)
    if gates:
        checkpoint = retrofit(checkpoint, gates, init)
    config, tensors = (checkpoint.config, checkpoint.tensors) if to == "gated" else export(checkpoint, to)
    dtype = model_dtype(tensors)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    num_parameters = sum(tensor.num_elements for tensor in tensors.values())
    name = target_folder.resolve().name
    return _Prepared(
        config=config,
        tensors=tensors,
        card=_card(source, folder, checkpoint, name, num_parameters, config.model_type, is_same=not gates),
        origin=checkpoint.origin,
        gates=checkpoint.config.gates,
        num_parameters=num_parameters,
        left_out=checkpoint.left_out,
        widened=sum(tensor.dtype.itemsize > dtype.itemsize for tensor in tensors.values()),
    )


def _check_family(folder: Path, to: Target, self_contained: bool) -> None:
    model_type = read_json(folder / "config.json").get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{folder / 'config.json'} names no model_type; fetch it again")
    if to != "gated":
        raise ValueError(f"{to} can express a gated Qwen3 only, and this is a {model_type}; leave out --to")
    if self_contained:
        raise ValueError(
            f"code is carried for Qwen3 only, and this is a {model_type}; leave out --self-contained, and load the "
            "folder after `import gated_attention.models`"
        )


def _prepare_family(
    source: str,
    folder: Path,
    target_folder: Path,
    gates: tuple[GateSpec, ...],
    init: Init,
    layers: list[int] | str | None,
    attention: AttentionKind,
) -> _Prepared:
    model = gate_family(folder, gates, init, layers, attention)
    kind, place = model.kind.__name__, describe_place(model.config)
    data, base_model = _source_card(source, folder)
    card = family_card(
        kind,
        model.config,
        target_folder.resolve().name,
        place,
        model.num_parameters,
        model.num_added,
        base_model=base_model,
        license=getattr(data, "license", None),
        pipeline_tag=getattr(data, "pipeline_tag", None),
    )
    return _Prepared(
        config=model.config,
        tensors=model.tensors,
        card=card,
        origin=kind,
        gates=model.config.gates,
        num_parameters=model.num_parameters,
        place=place,
        generation=model.generation,
    )


def _llama_cpp_warnings(folder: Path) -> tuple[str, ...]:
    """Whether llama.cpp refuses the tokenizer: its converter knows a BPE by the tokens that one text becomes."""
    path = folder / "tokenizer.json"
    model = read_json(path).get("model") if path.is_file() else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return ()
    if len(model.get("vocab") or ()) >= _SMALLEST_KNOWN_BPE:
        return ()
    if not model.get("merges"):
        return ("llama.cpp loads no tokenizer without merges, such as this byte tokenizer; serve the model with vLLM",)
    return (
        "llama.cpp's convert_hf_to_gguf.py refuses tokenizers that it does not know (BPE pre-tokenizer was not "
        "recognized), such as this one; docs/checkpoints.md says how to name it",
    )


def _is_rewritten(path: Path) -> bool:
    """Whether a file of the source is written anew, or left out: code and hidden files."""
    return path.name in ("config.json", CARD_NAME) or path.suffix == ".py" or path.name.startswith(".")


def _card(
    source: str, folder: Path, checkpoint: Checkpoint, name: str, num_parameters: int, stored_as: str, is_same: bool
) -> str:
    """A new card with the source's licence and base model, and its measures if the model is still the same."""
    old = _old_card(folder)
    data, base_model = _source_card(source, folder)
    return model_card(
        checkpoint.config,
        name,
        num_parameters,
        base_model=base_model,
        license=getattr(data, "license", None),
        stored_as=stored_as,
        sections=measured_sections(old.content) if old and is_same else "",
    )


def _old_card(folder: Path) -> ModelCard | None:
    path = folder / CARD_NAME
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None


def _source_card(source: str, folder: Path) -> tuple[Any, str | None]:
    """The data of the source's card, and the hub name of the model that a conversion starts from, if known."""
    old = _old_card(folder)
    data = old.data if old else None
    from_hub = not Path(source).exists()
    return data, "/".join(source.split("/")[:2]) if from_hub else getattr(data, "base_model", None)
