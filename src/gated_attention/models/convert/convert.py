"""One model folder into another: read, change the layout, write, all or nothing."""

import fcntl
import glob
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal, get_args

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from gated_attention.files import write_text
from gated_attention.models.convert.canonical import Config, one_line
from gated_attention.models.convert.read import model_dtype, read_model
from gated_attention.models.convert.retrofit import WARNING, retrofit
from gated_attention.models.convert.source import check_adapter, check_links, find_source
from gated_attention.models.convert.storage import Stored, is_weight_file, read_json, write_checkpoint
from gated_attention.models.convert.write import export, top_level
from gated_attention.models.saved.card import CARD_NAME, measured_sections, model_card
from gated_attention.models.saved.self_contained import write_self_contained
from gated_attention.spec import Gates, GateSpec, Init, as_gates

Target = Literal["gated", "qwen3_next", "qwen3_5", "llama_cpp"]
DEFAULT_SHARD_BYTES = 10**9


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done.

    Attributes:
        became: The new `model_type`.
        left_out: Tensors of the source that the model has no place for.
        widened: Norms stored wider than the model, because `weight - 1` does not fit its dtype.
        time_s: Wall-clock time.
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
            lines.append(f"left out: {len(self.left_out)} tensors, {self.left_out[0]} first")
        if self.widened:
            lines.append(f"{self.widened} norms are stored in float32: less one, they do not fit the model's dtype")
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
    """Convert a checkpoint, tensor by tensor; nothing appears at `target_folder` unless everything went well.

    Args:
        source: A local folder, a hub name, or a folder inside a hub repository, `owner/repository/folder`.
        target_folder: Absent or empty.
        to: This package's layout, or the stock architecture that the result is to be.
        add_gate: Gates for a model without one.
        init: How added gates start; `zeros` leaves the first forward pass unchanged.
        max_shard_bytes: Size at which weights are split over files.
        self_contained: Whether the folder carries this package's modelling code, for readers without the package.

    Raises:
        ValueError: if the source is damaged or unknown, or the target cannot express it; one line with the reason.
    """
    start = time.monotonic()
    if to not in get_args(Target):
        raise ValueError(f"to is {to!r}; choose from {', '.join(get_args(Target))}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    if init not in get_args(Init):
        raise ValueError(f"init is {init!r}; choose from {', '.join(get_args(Init))}")
    if init != "zeros" and not add_gate:
        raise ValueError(f"init {init!r} initialises added gates; name them with add_gate")
    if self_contained and to != "gated":
        raise ValueError("self_contained is for to='gated'; transformers itself has the code of the others")
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
    config, tensors = checkpoint.config, checkpoint.tensors
    if to == "gated":
        config.architectures = [_CLASSES[config.model_type]]
    else:
        config, tensors = export(checkpoint, to)
    warnings: tuple[str, ...] = (WARNING,) if gates else ()
    if to == "llama_cpp":
        warnings += _llama_cpp_warnings(folder)
    dtype = model_dtype(tensors)
    config.dtype = str(dtype).removeprefix("torch.")
    num_parameters = _count(tensors)
    with _all_or_nothing(target_folder) as partial:
        _copy_other_files(folder, partial)
        config.save_pretrained(partial)
        if to != "gated":
            path = partial / "config.json"
            write_text(path, json.dumps(read_json(path) | top_level(config), indent=2, sort_keys=True) + "\n")
        write_checkpoint(partial, tensors, max_shard_bytes)
        name = target_folder.resolve().name
        own, became = checkpoint.config, config.model_type
        _write_card(folder, str(source), partial, name, own, num_parameters, became, is_same=not gates)
        if self_contained:
            write_self_contained(partial)
        files = tuple(sorted(path.name for path in partial.iterdir()))
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
        warnings=warnings,
    )


_FEWEST_TOKENS = 32_000


def _llama_cpp_warnings(folder: Path) -> tuple[str, ...]:
    """What llama.cpp will not take: its converter knows tokenizers of byte pairs by what they make of one text."""
    path = folder / "tokenizer.json"
    model = read_json(path).get("model") if path.is_file() else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or len(model.get("vocab") or ()) >= _FEWEST_TOKENS:
        return ()
    if not model.get("merges"):
        return ("llama.cpp loads no tokenizer without merges, such as this one of bytes; serve the model with vLLM",)
    return (
        "llama.cpp's convert_hf_to_gguf.py refuses tokenizers that it does not know (BPE pre-tokenizer was not "
        "recognized), such as this one; docs/checkpoints.md says how to name it",
    )


_CLASSES = {"gated_qwen3": "GatedQwen3ForCausalLM", "gated_qwen3_moe": "GatedQwen3MoeForCausalLM"}


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    place = folder.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        partial = place.parent / f"{_partial(place)}{token_hex(4)}"
        partial.mkdir()
        try:
            with _locked(partial):
                yield partial
                os.replace(partial, place)
        except BaseException:
            shutil.rmtree(partial)
            raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({one_line(error)}); nothing was left there") from error


def _partial(place: Path) -> str:
    return f".{place.name}.partial-"


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold a lock, which the kernel gives back when the process ends, however it ends."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(place: Path) -> None:
    """Remove what conversions to the same folder left that were killed."""
    for left in place.parent.glob(f"{glob.escape(_partial(place))}*"):
        with suppress(OSError), _locked(left):  # of one that still runs
            shutil.rmtree(left)


def _count(tensors: Mapping[str, Stored]) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())


def _write_card(
    folder: Path, source: str, target: Path, name: str, config: Config, num_parameters: int, became: str, is_same: bool
) -> None:
    from_hub = not Path(source).exists()
    path = folder / CARD_NAME
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    data = old.data if old else None
    card = model_card(
        config,
        name,
        num_parameters,
        base_model="/".join(source.split("/")[:2]) if from_hub else getattr(data, "base_model", None),
        license=getattr(data, "license", None),
        stored_as=became,
        sections=measured_sections(old.content) if old and is_same else "",
    )
    (target / CARD_NAME).write_text(card, encoding="utf-8")


def _copy_other_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        skipped = path.name in ("config.json", CARD_NAME) or path.suffix == ".py" or path.name[0] == "."
        if path.is_file() and not skipped and not is_weight_file(path):
            shutil.copyfile(path, target / path.name)
