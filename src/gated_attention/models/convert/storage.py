"""Checkpoints on disk, tensor by tensor: shapes are known at once, each weight is read only when it is needed."""

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gated_attention.typed import parse, read_bytes

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weight files, or the index of several, in the order in which transformers looks for them."""

_LFS_POINTER = b"version https://git-lfs"
_REFUSED = re.compile(r"Unsupported global: GLOBAL (\S+)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")
_OBJECT = TypeAdapter(dict[str, Any])
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that `load` reads; `origin` is its file, for messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    origin: str

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.num_elements * self.dtype.itemsize

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same values; they are read only where the shapes agree."""
        return self.shape == other.shape and torch.equal(self.load(), other.load())


Tensors = dict[str, Stored]


def parse_size(text: str) -> int:
    """The bytes of a size such as 500MB or 2GB, in powers of 1000.

    Raises:
        ValueError: if it cannot be parsed.
    """
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip().upper())
    if found is None or int(found[1]) < 1:
        raise ValueError(f"size {text!r} is not understood; write e.g. 500MB or 2GB")
    return int(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def is_weight_file(path: Path) -> bool:
    """Whether a file of a model folder holds weights or their index."""
    return path.name.endswith(_WEIGHTS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file is missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a model")
    return parse(_OBJECT, read_bytes(path, "fetch it again"), path, "fetch it again")


def open_checkpoint(folder: Path, allow_repeats: bool = True) -> Tensors:
    """Every tensor of a model folder, sharded or not, safetensors or pickled, in any dtype.

    Pickles are read with `weights_only=True`: one that asks for anything but tensors is refused.

    Args:
        allow_repeats: Whether two files may hold the same tensor; the file that the index names then wins.

    Raises:
        ValueError: if weights are missing, damaged or refused, or the index and its files disagree; names the file.
    """
    path = find_weights(folder)
    return _open_sharded(folder, path, allow_repeats) if path.suffix == ".json" else _open_file(path)


def find_weights(folder: Path) -> Path:
    """The weight file of a model folder, or the index of several: the one that transformers loads.

    Raises:
        ValueError: if there is none.
    """
    names: tuple[str, ...] = _NAMES
    config = folder / "config.json"
    if config.is_file() and (named := read_json(config).get("transformers_weights")) is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{config} has transformers_weights {named!r}; expected a safetensors file or the index of several"
            )
        names = (_inside(named, config),)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no weights; expected {' or '.join(names)}")


def has_weights(folder: Path) -> bool:
    """Whether a model's weights lie in the folder."""
    return any((folder / name).is_file() for name in _NAMES)


def _inside(name: str, listed_by: Path) -> str:
    """The name, once it is known to stay inside the folder of the file that lists it."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not name:
        raise ValueError(f"{listed_by} lists {name!r}, which is outside its folder; fetch it again")
    return name


def _open_sharded(folder: Path, index: Path, allow_repeats: bool) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch it again")
    tensors: Tensors = {}
    for name in sorted({_inside(file, index) for file in weight_map.values()}):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, and {index.name} lists it; fetch it again")
        for tensor, stored in _open_file(folder / name).items():
            if tensor not in weight_map:
                raise ValueError(f"tensor {tensor} of {folder / name} is not in {index.name}; fetch it again")
            if weight_map[tensor] == name:
                tensors[tensor] = stored
            elif not allow_repeats:
                raise ValueError(
                    f"tensor {tensor} is in {folder / name} too, but {index.name} names {weight_map[tensor]}; "
                    "gated-attention convert writes a folder with only the one named"
                )
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing from {folder / file}; fetch it again")
    return tensors


def _open_file(path: Path) -> Tensors:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a Git LFS pointer and holds no weights; run git lfs pull")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged (cut short); fetch it again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, "pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, partial(_load_safetensor, path, name), str(path))
        for name, tensor in mapped.items()
    }


def check_floating(name: str, tensor: Stored) -> None:
    """Refuse a weight that does not hold plain floating-point numbers, such as a quantised one."""
    if tensor.dtype not in _DTYPES.values():
        raise ValueError(f"tensor {name} of {tensor.origin} has dtype {tensor.dtype}; choose from {', '.join(_DTYPES)}")


def _load_safetensor(path: Path, name: str) -> Tensor:
    # Each tensor opens the file anew, so that the pages of earlier ones do not stay mapped.
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"tensor {name} of {path} cannot be read ({error}); fetch it again") from error
    return tensor


def _open_pickle(path: Path) -> Tensors:
    try:
        with warnings.catch_warnings():
            # A pickle of another protocol loads or is refused below; torch's warning would be a second line.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            # Mapped, not read; files from before PyTorch 1.6 cannot be mapped, and stay in memory whole.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        asked = f"asks for {refused[1]}, which is no tensor," if refused else "is damaged or asks for more than tensors"
        raise ValueError(f"{path} {asked} and is refused; ask its maker for safetensors") from error
    except Exception as error:  # PyTorch's reader fails in many ways on what is not a pickle
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged ({reason}); fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a mapping of names to tensors; give a state dict")
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, tensor.clone, str(path)) for name, tensor in content.items()
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int) -> None:
    """Write safetensors with one shard in memory at a time, or a single file if everything fits in one shard."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: _own(tensors[name].load()) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as two parts of one packed tensor may.
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
