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

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights, or their index, in the order in which transformers looks for them."""

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
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return content


def open_checkpoint(folder: Path, allow_repeats: bool = True) -> dict[str, Stored]:
    """Every tensor of a model folder, sharded or not, safetensors or pickled, in any dtype.

    Pickles are read with `weights_only=True`: one that asks for anything but tensors is refused.

    Args:
        allow_repeats: Whether two files may hold one tensor; that of the file which the index names is taken.

    Raises:
        ValueError: if weights are missing, damaged or refused, or the index and its files disagree; names the file.
    """
    path = find_weights(folder)
    return _open_sharded(folder, path, allow_repeats) if path.suffix == ".json" else _open_file(path)


def find_weights(folder: Path) -> Path:
    """The single file of weights in a model folder, or the index of several: the one that transformers loads.

    Raises:
        ValueError: if there is none.
    """
    named = _named_weights(folder)
    names = _NAMES if named is None else (named,)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no weights; expected {' or '.join(names)}")


def has_weights(folder: Path) -> bool:
    """Whether a model's weights lie in the folder."""
    return any((folder / name).is_file() for name in _NAMES)


def _named_weights(folder: Path) -> str | None:
    """The file that config.json names instead of the usual ones, if it does."""
    path = folder / "config.json"
    if not path.is_file() or (named := read_json(path).get("transformers_weights")) is None:
        return None
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{path} has transformers_weights {named!r}; expected a file of safetensors or its index")
    return _inside(named, path)


def _inside(name: str, listed_by: Path) -> str:
    """The name of a file in the folder of the file that lists it.

    Raises:
        ValueError: if it leads out of that folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or not name:
        raise ValueError(f"{listed_by} lists {name!r}, which is outside its folder; fetch it again")
    return name


def _open_sharded(folder: Path, index: Path, allow_repeats: bool) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch it again")
    tensors: dict[str, Stored] = {}
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
                    f"tensor {tensor} is in {folder / name} too, and {index.name} names {weight_map[tensor]}; "
                    "gated-attention convert writes a folder with the one that is named"
                )
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
        named = lazy.get_dtype()
        if named not in _DTYPES | _OTHER_DTYPES:
            raise ValueError(f"tensor {name} of {path} has dtype {named}; choose from {', '.join(_DTYPES)}")
        dtype = (_DTYPES | _OTHER_DTYPES)[named]
        tensors[name] = Stored(tuple(lazy.get_shape()), dtype, _loader(path, name), str(path))
    return tensors


def check_floating(name: str, tensor: Stored) -> None:
    """Refuse a weight that is not a plain floating-point number, such as one of a quantised model.

    Raises:
        ValueError: if it is of another dtype.
    """
    if tensor.dtype not in _DTYPES.values():
        raise ValueError(f"tensor {name} of {tensor.origin} has dtype {tensor.dtype}; choose from {', '.join(_DTYPES)}")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""Of buffers and quantised weights."""


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
    except Exception as error:  # what is no pickle is read as one until something in PyTorch's reader does not fit
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged ({reason}); fetch it again") from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int) -> None:
    """Write safetensors, one shard in memory at a time; a single file if everything fits in one shard."""
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _own(tensors[name].load()) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors gives its owner alone the right to read
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
