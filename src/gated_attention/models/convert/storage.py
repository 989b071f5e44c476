"""Checkpoints on disk, tensor by tensor: shapes are known before any weight is read, weights when they are needed."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_LFS_POINTER = b"version https://git-lfs"
_REFUSED = re.compile(r"Unsupported global: GLOBAL (\S+)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is read when `load` is called.

    Attributes:
        origin: The file it comes from, for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    origin: str

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes from a size such as 500MB or 2GB, in powers of 1000.

    Raises:
        ValueError: if it is none.
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
        ValueError: if the file is missing, not JSON, or no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return content


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder, sharded or not, safetensors or pickled.

    Pickles are read with `weights_only=True`: one that asks for anything but tensors is refused.

    Raises:
        ValueError: if weights are missing, damaged or refused; the message names the file.
    """
    path = find_weights(folder)
    return _open_sharded(folder, path) if path.suffix == ".json" else _open_file(path)


def find_weights(folder: Path) -> Path:
    """The single file of weights in a model folder, or the index of several.

    Raises:
        ValueError: if there is none.
    """
    for single in _SINGLE:
        for name in (f"{single}.index.json", single):
            if (folder / name).is_file():
                return folder / name
    raise ValueError(f"{folder} holds no weights; expected {' or '.join(_SINGLE)}, or their index")


def _open_sharded(folder: Path, index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch it again")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, and {index.name} lists it; fetch it again")
        tensors |= _open_file(folder / name)
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing from {folder / file}; fetch it again")
    return tensors


def _open_file(path: Path) -> dict[str, Stored]:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS and holds no weights; run git lfs pull")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged (cut short); fetch it again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file: Any = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    tensors = {}
    for name in file.keys():  # noqa: SIM118  not a mapping
        lazy = file.get_slice(name)
        dtype = _DTYPES.get(lazy.get_dtype())
        if dtype is None:
            raise _wrong_dtype(name, path, lazy.get_dtype())
        tensors[name] = Stored(tuple(lazy.get_shape()), dtype, _loader(path, name), str(path))
    return tensors


def _wrong_dtype(name: str, path: Path, dtype: object) -> ValueError:
    return ValueError(f"tensor {name} of {path} has dtype {dtype}; choose from {', '.join(_DTYPES)}, not quantised")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _loader(path: Path, name: str) -> Callable[[], Tensor]:
    # Opened anew for each tensor, so that the pages of earlier ones do not stay mapped.
    def load() -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"tensor {name} of {path} cannot be read ({error}); fetch it again") from error
        return tensor

    return load


def _open_pickle(path: Path) -> dict[str, Stored]:
    content = _read_pickle(path, "meta")
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is no mapping of names to tensors; give a state dict")
    for name, tensor in content.items():
        if tensor.dtype not in _DTYPES.values():
            raise _wrong_dtype(name, path, tensor.dtype)
    load = _map_tensor if zipfile.is_zipfile(path) else partial(_copy_tensor, lru_cache(maxsize=1)(_read_pickle))
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, partial(load, path, name), str(path))
        for name, tensor in content.items()
    }


def _map_tensor(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor, as above.
    tensor: Tensor = _read_pickle(path, "cpu")[name]
    return tensor


def _copy_tensor(read: Callable[[Path, str], Any], path: Path, name: str) -> Tensor:
    # Files older than PyTorch 1.6 cannot be mapped: they stay in memory whole, where tensors may share it.
    tensor: Tensor = read(path, "cpu")[name]
    return tensor.clone()


def _read_pickle(path: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            # A pickle of another protocol either loads or is refused below; torch's doubt would be a second line.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        asked = f"asks for {refused[1]}, which is no tensor," if refused else "is damaged or asks for more than tensors"
        raise ValueError(f"{path} {asked} and is refused; ask its maker for safetensors") from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged ({reason}); fetch it again") from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int) -> None:
    """Write safetensors, one shard in memory at a time; a single file if everything fits in one shard."""
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _own(tensors[name].load()) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, which two parts of one packed tensor may do.
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _shards(tensors: Mapping[str, Stored], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.num_bytes
    yield names
