"""Loads a trained model and its tokenizer from a folder, a run of `compare`, or the hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

import gated_attention.models  # noqa: F401  registers the gated models
from gated_attention.models.convert.storage import has_weights
from gated_attention.models.saved.loading import check_folder, load_model
from gated_attention.nn.eval_mode import evaluating
from gated_attention.train.checkpoints import last_checkpoint
from gated_attention.train.quiet import quiet
from gated_attention.train.text.corpus import require_hub
from gated_attention.train.text.tokenizer import HUB_NAME, has_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The location and the names of a model.

    Attributes:
        name: The name that the caller gave.
        label: Short name: variant and seed of an arm of `compare`, otherwise the last part of the name.
        path: Folder or hub name to load from.
    """

    name: str
    label: str
    path: str


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name: a folder with a model, an arm's folder `<variant>/seed<k>`, or a hub name.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        newest = None if has_weights(folder) else last_checkpoint(folder)
        path = newest or folder
        if not (path / "config.json").exists():
            if (path / "adapter_config.json").exists():
                check_folder(path)
            raise ValueError(f"{name} holds no model (no config.json); give a model's folder or a hub name")
        return Checkpoint(_printable(name), _label(path.resolve()), str(path))
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise ValueError(f"no model folder {name!r}; give a folder that exists or a hub name")
    require_hub(name)
    return Checkpoint(name, name.rsplit("/", maxsplit=1)[-1], name)


def _label(path: Path) -> str:
    arm = path.parent if path.name.startswith("checkpoint-") else path
    return _printable(f"{arm.parent.name} {arm.name}" if re.fullmatch(r"seed\d+", arm.name) else path.name)


def _printable(name: str) -> str:
    """A name that pages and figures can show."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def load_checkpoint(
    checkpoint: Checkpoint, device: torch.device, tokenizer: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in its stored dtype on a GPU and in float32 on a CPU, and its tokenizer.

    Args:
        tokenizer: As `train.text.tokenizer.load_tokenizer`; None is the one beside the model.

    Raises:
        ValueError: if either cannot be loaded, or weights are missing, unexpected or not finite.
    """
    loaded_tokenizer = find_tokenizer(checkpoint, tokenizer)
    return _load(AutoModelForCausalLM, checkpoint, device), loaded_tokenizer


def find_tokenizer(checkpoint: Checkpoint, tokenizer: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of that name, by default the one beside the model.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(checkpoint.path)
    if tokenizer is None and folder.is_dir() and not has_tokenizer(folder):
        raise ValueError(f"no tokenizer beside the model in {folder}; give one with --tokenizer")
    return load_tokenizer(checkpoint.path if tokenizer is None else tokenizer)


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a model.

    Raises:
        ValueError: if transformers cannot read it.
    """
    try:
        with quiet():
            return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint.name} has no configuration that transformers reads ({reason})") from error


def load_any(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """A model of any kind, e.g. a masked language model or an image classifier, of the class that was saved.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    config = read_config(checkpoint)
    saved = next(iter(config.architectures or ()), None)
    loaders = [AutoModelForCausalLM, *(auto for auto in vars(modeling_auto).values() if isinstance(auto, type))]
    classes = [(auto, (getattr(auto, "_model_mapping", None) or {}).get(type(config), None)) for auto in loaders]
    by_name = [auto for auto, kind in classes if saved in (None, getattr(kind, "__name__", "")) and kind is not None]
    return _load(by_name[0] if by_name else AutoModel, checkpoint, device)


def _load(loader: Any, checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    with quiet():
        model = load_model(loader, checkpoint.path, checkpoint.name, dtype=dtype)
    for tensor, weight in model.named_parameters():
        if weight.dtype.itemsize > 1 and not torch.isfinite(weight).all():  # isfinite does not take 8 bits
            place = f"tensor {tensor} of {checkpoint.name}"
            raise ValueError(f"{place} holds values that are not finite; take an earlier checkpoint")
    return model.to(device).eval()


def name_dtype(model: PreTrainedModel) -> str:
    """The dtype of a model's weights and the quantiser, if any: `float32, quantised by bitsandbytes`."""
    dtype = str(model.dtype).removeprefix("torch.")
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is None:
        return dtype
    method = quantisation.quant_method
    return f"{dtype}, quantised by {getattr(method, 'value', method)}"


def check_tokenizer(model: PreTrainedModel, largest_id: int, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ValueError: if the largest is beyond them.
    """
    size = model.get_input_embeddings().num_embeddings
    if largest_id >= size:
        mismatch = f"it gave token {largest_id}, the model knows {size}"
        raise ValueError(f"the tokenizer does not fit {name}: {mismatch}; give another --tokenizer")


def num_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for; None if it names no number.

    RoBERTa and its kin begin to count behind the padding token, so that their tables hold fewer than they have rows.
    """
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    found = getattr(model.config, "max_position_embeddings", None)
    return int(found) if found else None


def require_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits depend on later tokens, such as an encoder.

    Raises:
        ValueError: if they do.
    """
    with evaluating(model) as device:
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    noise = 64 * torch.finfo(logits.dtype).eps * logits.float().abs().max()
    if (logits[0] - logits[1]).float().abs().max() > noise:
        raise ValueError(f"{name} ({model.config.model_type}) is not causal: it reads later tokens; give a decoder")
