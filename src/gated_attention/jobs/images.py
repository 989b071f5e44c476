"""Images as vision models read them: from files, a folder or Parquet, resized and normalised as the model's own do."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from gated_attention.analysis import InputBatch
from gated_attention.train.images.decode import Stored, decode
from gated_attention.typed import open_dict, parse, read_bytes

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

_PREPROCESSOR = "preprocessor_config.json"
_CURE = "mend or remove it"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SETTINGS = TypeAdapter(
    open_dict("Preprocessor", do_normalize=bool | None, image_mean=list[float] | None, image_std=list[float] | None)
)


def load_images(source: str, field: str = "image") -> list[Stored]:
    """Images in a fixed order: those of a Parquet file, a folder of image or Parquet files, or one image.

    Args:
        field: The column of Parquet that holds encoded images, as bytes or as `datasets` stores them.

    Raises:
        ValueError: if there is none.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise ValueError(f"no images at {source!r}; give --data a folder of images or a Parquet file")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: list[Stored] = []
    for file in files:
        if file.suffix.lower() in FORMATS:
            found.append(file)
        elif file.suffix.lower() == ".parquet":
            found += _rows(file, field)
    if not found:
        raise ValueError(f"{source} holds no images; use Parquet or {', '.join(FORMATS)}")
    return found


def _rows(file: Path, field: str) -> Iterator[bytes]:
    try:
        table = pq.read_table(file, columns=[field])
    except (OSError, ValueError) as error:  # pyarrow's are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as Parquet with a column {field!r} ({reason})") from error
    if field not in table.column_names:
        raise ValueError(f"{file} has no column {field!r}; it has {', '.join(pq.read_schema(file).names)}")
    return (row["bytes"] if isinstance(row, dict) else row for row in table.column(field).to_pylist())


def image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the images that a model reads.

    Raises:
        ValueError: if it reads images of no fixed size.
    """
    size = getattr(model.config, "image_size", None)
    if size is None or not hasattr(model.config, "patch_size"):
        raise ValueError(f"{type(model).__name__} reads no patches of images of one size, as ViT does")
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def image_batches(
    images: Sequence[Stored], model: PreTrainedModel, source: str, *, num_images: int, batch_size: int
) -> list[InputBatch]:
    """A random choice of the images, the same for every model, resized to what the model reads.

    They are normalised by the mean and the deviation in the `preprocessor_config.json` beside the model, otherwise to
    -1 to 1.

    Args:
        source: The model's folder or hub name.

    Raises:
        ValueError: if an image or that file cannot be read, or the model reads other images than grey or colour.
    """
    height, width = image_size(model)
    channels = model.config.num_channels
    if channels not in _MODES:
        raise ValueError(f"{type(model).__name__} reads images of {channels} channels; analyze reads 1, 3 or 4")
    mean, std = (torch.tensor(values)[:, None, None] for values in _normalisation(source, channels))
    order = np.random.default_rng(0).permutation(len(images))[:num_images].tolist()
    pixels = torch.stack([_pixels(images[index], width, height, _MODES[channels]) for index in order])
    return [InputBatch({"pixel_values": part}) for part in torch.split((pixels - mean) / std, batch_size)]


def _normalisation(source: str, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation by channel."""
    path = cached_file(
        source,
        _PREPROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    found: dict[str, Any] = {} if path is None else parse(_SETTINGS, read_bytes(Path(path), _CURE), path, _CURE)
    if not found.get("do_normalize", True):
        return [0.0] * channels, [1.0] * channels
    mean, std = (found.get(name) or [0.5] * channels for name in ("image_mean", "image_std"))
    if not len(mean) == len(std) == channels or 0 in std:
        raise ValueError(f"{path} has a mean and a deviation that do not fit {channels} channels; {_CURE}")
    return mean, std


def _pixels(stored: Stored, width: int, height: int, mode: str) -> Float[Tensor, "c y x"]:
    """An image as numbers from 0 to 1."""
    return torch.from_numpy(decode(stored, width, height, mode).astype(np.float32) / 255).permute(2, 0, 1)
