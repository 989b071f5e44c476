"""Checkpoints of the engine: resuming runs no code of theirs, and each becomes a Hugging Face folder."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_keys
from olmo_core.distributed.utils import get_rank
from olmo_core.io import file_exists, is_url, resource_path
from olmo_core.train.checkpoint import Checkpointer, CheckpointerConfig
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gated_attention.engine.config import engine_config
from gated_attention.engine.convert import num_experts_of, split, stored_names
from gated_attention.engine.whole import write_sizes
from gated_attention.files import new_folder
from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert.storage import Stored, Tensors, write_checkpoint

_WEIGHTS = "model_and_optim"
_ASKED = re.compile(r"GLOBAL (\w[\w.]*)")
_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_METADATA = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}
"""All that the index of a distributed checkpoint names."""
_TRAINER_STATE = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]  # type: ignore[attr-defined]
"""Beside tensors, what the trainer's state holds: NumPy's random numbers."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def guarded(folder: Path | str) -> Iterator[None]:
    """Read a checkpoint, local or in an object store, without running code that it carries.

    OLMo-core reads the trainer's state and every tensor by `torch.load` with `weights_only=False`, and the index by
    `pickle`. Within this block PyTorch's own switch forces `weights_only=True` on every `torch.load`, and the index has
    been read once before by an unpickler that knows its classes only.

    Raises:
        ValueError: if the index or a pickle asks for anything else.
    """
    try:
        for place in (f"{folder}/{_WEIGHTS}", str(folder)):
            if file_exists(f"{place}/.metadata"):
                with Path(resource_path(place, ".metadata")).open("rb") as file:
                    _Index(file).load()
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "1"
        try:
            with torch.serialization.safe_globals(_TRAINER_STATE):
                yield
        finally:
            os.environ.pop(_SWITCH)
            os.environ |= {} if before is None else {_SWITCH: before}
    except (pickle.UnpicklingError, CheckpointException) as error:
        asked = _ASKED.search(str(error))
        if asked is None and isinstance(error, CheckpointException):
            raise
        what = f"asks for {asked[1]}" if asked else "is damaged or asks for more than tensors and plain data"
        raise ValueError(f"checkpoint {folder} {what} and is refused; resume from the engine's own only") from error


class GuardedCheckpointer(Checkpointer):  # type: ignore[misc]  # OLMo-core is untyped here
    """OLMo-core's checkpointer, which loads under `guarded`, and notes the sizes of a local checkpoint's files."""

    def load(self, dir: Path | str, *args: Any, **options: Any) -> dict[str, Any] | None:
        """As `Checkpointer.load`."""
        with guarded(dir):
            state: dict[str, Any] | None = super().load(dir, *args, **options)
        return state

    def _save_metadata(self, dir: Path | str, metadata: Any) -> None:
        if get_rank() == 0 and not is_url(dir):
            write_sizes(Path(dir))
        super()._save_metadata(dir, metadata)


@dataclass
class GuardedCheckpointerConfig(CheckpointerConfig):  # type: ignore[misc]
    """`TrainerConfig.checkpointer` for runs whose folder may hold checkpoints of others."""

    def build(self, *args: Any, **options: Any) -> GuardedCheckpointer:
        """The checkpointer."""
        return GuardedCheckpointer(**vars(super().build(*args, **options)))


def export_checkpoint(
    checkpoint: Path,
    config: GatedQwen3Config | GatedQwen3MoeConfig,
    output: Path,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the model of a checkpoint, saved on any number of processes, as a folder that `from_pretrained` loads.

    One shard of the output is in memory at a time, and one tensor of the checkpoint.

    Args:
        checkpoint: A `step...` folder of a run, or the distributed checkpoint in it.
        config: Of the model that was trained.
        output: A new folder.

    Raises:
        ValueError: if the checkpoint is refused, or of another configuration.
    """
    place = checkpoint / _WEIGHTS if (checkpoint / _WEIGHTS).is_dir() else checkpoint
    with guarded(place), new_folder(output) as folder:
        stored = get_checkpoint_metadata(place).state_dict_metadata
        model = engine_config(config).build(init_device="meta")
        num_experts = num_experts_of(model)
        read = lru_cache(maxsize=1)(partial(_read, place))
        tensors: Tensors = {}
        for name, parameter in model.named_parameters():  # a tied head is no parameter of its own
            found = stored.get(f"model.{name}")
            if found is None or found.size != parameter.shape:
                had = "nothing" if found is None else list(found.size)
                raise ValueError(
                    f"checkpoint {checkpoint} has {had} for {name}, the configuration {list(parameter.shape)}; "
                    "give the configuration that it was trained with"
                )
            parts = split(name, parameter.to(found.properties.dtype), num_experts)
            for i, (part, whole) in enumerate(zip(parts, stored_names(name, num_experts), strict=True)):
                load = partial(_part, read, name, i, num_experts)
                tensors[whole] = Stored(tuple(part.shape), part.dtype, load, str(place))
        write_checkpoint(folder, tensors, max_shard_bytes)
        config = deepcopy(config)
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(folder)


def _read(place: Path, name: str) -> Tensor:
    tensor: Tensor
    [tensor] = load_keys(place, [f"model.{name}"])
    return tensor


def _part(read: Any, name: str, i: int, num_experts: int) -> Tensor:
    return split(name, read(name), num_experts)[i]
