"""Convert one model folder into another: read, change the layout, write, all or nothing."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from gated_attention.files import new_folder, write_text
from gated_attention.models.convert.canonical import Checkpoint, one_line
from gated_attention.models.convert.read import model_dtype, read_model
from gated_attention.models.convert.retrofit import WARNING, retrofit
from gated_attention.models.convert.source import check_adapter, check_links, find_source
from gated_attention.models.convert.storage import is_weight_file, read_json, write_checkpoint
from gated_attention.models.convert.write import export
from gated_attention.models.saved.card import CARD_NAME, measured_sections, model_card
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

    def describe(self) -> list[str]:
        """The summary, line by line."""
        gates = " + ".join(gate.describe() for gate in self.gates) or "no gate"
        lines = [
            f"{self.origin} -> {self.became}: {gates}",
            f"{self.num_parameters:,} parameters, {self.num_bytes / 1e9:.2f} GB, {self.time_s:.1f} s, in {self.folder}",
            f"files: {', '.join(self.files)}",
        ]
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} tensors, the first is {self.left_out[0]}")
        if self.widened:
            lines.append(f"{self.widened} norms are stored in float32: weight - 1 is not exact in the model's dtype")
        return lines + [f"note: {warning}" for warning in self.warnings]


def convert(
    source: str | Path,
    target_folder: str | Path,
    to: Target = "gated",
    add_gate: Gates = None,
    init: Init = "zeros",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    self_contained: bool = False,
) -> Conversion:
    """Convert a checkpoint, tensor by tensor; nothing appears at `target_folder` unless everything succeeded.

    Args:
        source: A local folder, a hub name, or a folder inside a hub repository, `owner/repository/folder`.
        target_folder: Absent or empty.
        to: This package's layout, or the stock architecture to export to.
        add_gate: Gates for a model without one.
        init: How to initialise added gates; `zeros` leaves the first forward pass unchanged.
        max_shard_bytes: Size beyond which weights are split over several files.
        self_contained: Whether the folder carries this package's modelling code, for readers without the package.

    Raises:
        ValueError: if the source is damaged or unknown, or the target cannot express it; one line with the reason.
    """
    start = time.monotonic()
    require_choice("target", to, get_args(Target))
    require_within("max_shard_bytes", max_shard_bytes, least=1)
    require_choice("init", init, get_args(Init))
    if init != "zeros" and not add_gate:
        raise ValueError(f"init {init!r} initialises added gates; name them with add_gate")
    if self_contained and to != "gated":
        raise ValueError("self_contained needs to='gated'; transformers itself has the code of the other targets")
    target_folder = Path(target_folder).expanduser()
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise ValueError(f"{target_folder} is not an empty folder; give one that is absent or empty")
    folder = find_source(source)
    check_adapter(folder)
    checkpoint = read_model(folder)
    check_links(folder)
    gates = as_gates(add_gate)
    if gates:
        checkpoint = retrofit(checkpoint, gates, init)
    config, tensors = (checkpoint.config, checkpoint.tensors) if to == "gated" else export(checkpoint, to)
    dtype = model_dtype(tensors)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    num_parameters = sum(tensor.num_elements for tensor in tensors.values())
    try:
        with new_folder(target_folder) as part:
            for path in folder.iterdir():
                if path.is_file() and not is_weight_file(path) and not _is_rewritten(path):
                    shutil.copyfile(path, part / path.name)
            config.save_pretrained(part)
            if to != "gated":
                # mlx-lm and SGLang read these at the top; transformers writes them in `rope_parameters` alone.
                at_top = {name: config.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
                content = read_json(part / "config.json") | at_top
                write_text(part / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
            write_checkpoint(part, tensors, max_shard_bytes)
            name = target_folder.resolve().name
            card = _card(str(source), folder, checkpoint, name, num_parameters, config.model_type, is_same=not gates)
            (part / CARD_NAME).write_text(card, encoding="utf-8")
            if self_contained:
                write_self_contained(part)
            files = tuple(sorted(path.name for path in part.iterdir()))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target_folder} cannot be written ({one_line(error)}); nothing was left there") from error
    return Conversion(
        folder=target_folder,
        origin=checkpoint.origin,
        became=config.model_type,
        gates=checkpoint.config.gates,
        num_parameters=num_parameters,
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        files=files,
        left_out=checkpoint.left_out,
        widened=sum(tensor.dtype.itemsize > dtype.itemsize for tensor in tensors.values()),
        time_s=time.monotonic() - start,
        warnings=((WARNING,) if gates else ()) + (_llama_cpp_warnings(folder) if to == "llama_cpp" else ()),
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
    path = folder / CARD_NAME
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    data = old.data if old else None
    from_hub = not Path(source).exists()
    return model_card(
        checkpoint.config,
        name,
        num_parameters,
        base_model="/".join(source.split("/")[:2]) if from_hub else getattr(data, "base_model", None),
        license=getattr(data, "license", None),
        stored_as=stored_as,
        sections=measured_sections(old.content) if old and is_same else "",
    )
