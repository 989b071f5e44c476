"""A model from a folder or the hub, whole or not at all; transformers only warns of weights that it leaves out."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from gated_attention.models.convert.source import adapter_error, check_adapter
from gated_attention.models.convert.storage import check_floating, has_weights, open_checkpoint, read_json
from gated_attention.typed import one_line

_MASKS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$")
"""Causal masks, which old checkpoints of GPT-2 and GPT-NeoX store."""
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer)\.|^base_model\.")
_GATE = re.compile(r"\.self_attn\.(g_proj|gate_proj|w_g)\.")


def load_model(loader: Any, source: str | Path, name: str | None = None, **options: Any) -> PreTrainedModel:
    """The model, every weight read and every stored tensor used.

    Args:
        loader: A class of transformers with `from_pretrained`: a model's, or one of the Auto classes.
        source: A folder or a hub name.
        name: What messages call it; by default `source`.
        options: Of `from_pretrained`.

    Raises:
        ValueError: if anything is missing, left over, damaged, tied but different, or quantised without saying so,
            or if an adapter lies there; one line with a tensor's name and the cure.
    """
    name = str(source) if name is None else name
    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        check_folder(folder)
    # Mismatched sizes are refused below, by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        if not (is_adapter := folder is None and find_adapter_config_file(str(source)) is not None):
            model, info = loader.from_pretrained(source, **options)
    except Exception as error:  # configuration, weights and hub each raise their own
        raise ValueError(f"{name} cannot be loaded as {_kind_of(loader)} ({one_line(error)})") from error
    if is_adapter:
        raise adapter_error(name)
    if folder is None and isinstance(cached := try_to_load_from_cache(str(source), "config.json"), str):
        check_folder(Path(cached).parent)
    _check_whole(model, info, name)
    return model


def _kind_of(loader: Any) -> str:
    """What a loader loads, in words."""
    return "a causal language model" if loader is AutoModelForCausalLM else f"what {loader.__name__} loads"


def check_folder(folder: Path) -> None:
    """Check the files of a model folder before a weight is read.

    Raises:
        ValueError: if it holds an adapter, or weights that are damaged, or quantised without saying so.
    """
    check_adapter(folder)
    is_quantised = read_json(folder / "config.json").get("quantization_config") is not None
    if is_quantised or not has_weights(folder):
        return  # other formats are transformers' to read
    for name, tensor in open_checkpoint(folder, allow_repeats=False).items():
        if not _MASKS.search(name) and not name.endswith("position_ids"):
            check_floating(name, tensor)


def _check_whole(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    kind = f"a {model.config.model_type} model"
    if errors := info["error_msgs"]:
        raise ValueError(f"{name} cannot be loaded as {kind} ({one_line(errors[0])})")
    if wrong := sorted(info["mismatched_keys"]):
        tensor, found, wanted = wrong[0]
        raise ValueError(
            f"{name} is no checkpoint of {kind}: tensor {tensor} has shape {list(found)} and config.json asks for "
            f"{list(wanted)}{_more(wrong)}; {_cure(tensor)}"
        )
    if left := sorted(key for key in info["unexpected_keys"] if not _is_buffer(model, key)):
        raise ValueError(
            f"{name} is no checkpoint of {kind}: it has no place for tensor {left[0]}{_more(left)}; {_cure(left[0])}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of its model, e.g. {missing[0]}; give a whole checkpoint"
        )
    _check_tied(model, name)


def _more(tensors: list[Any]) -> str:
    return f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""


def _cure(tensor: str) -> str:
    if _ADAPTER.search(tensor):
        return "merge the adapter with peft's merge_and_unload() and save the result"
    if _GATE.search(tensor):
        return "gated-attention convert gives a model that has this gate"
    return "make config.json that of the model which was saved, or fetch the checkpoint again"


def _is_buffer(model: nn.Module, key: str) -> bool:
    """Whether a stored tensor is one that the model computes for itself."""
    kept = model.state_dict().keys()
    computed = (name for name, _ in model.named_buffers() if name not in kept)
    return bool(_MASKS.search(key)) or any(name == key or name.endswith(f".{key}") for name in computed)


def _check_tied(model: PreTrainedModel, name: str) -> None:
    """Refuse a head of its own where the configuration ties it: transformers loads it and then says something else."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    tied, own = model.get_input_embeddings().weight, head.weight
    if tied is not own and (tied.shape != own.shape or not torch.equal(tied, own)):
        raise ValueError(
            f"the head of {name} differs from the embedding that config.json ties it to; "
            "set tie_word_embeddings to false"
        )
