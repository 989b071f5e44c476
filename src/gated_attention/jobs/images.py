"""Images as vision models read them: from files, a folder or Parquet, resized and normalised as the model's own do."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.analysis import InputBatch

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

_Stored = Path | bytes
_PREPROCESSOR = "preprocessor_config.json"


def load_images(source: str, field: str = "image") -> list[_Stored]:
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
    found: list[_Stored] = []
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


def image_batches(
    images: Sequence[_Stored], model: PreTrainedModel, folder: str, *, num_images: int, batch_size: int
) -> list[InputBatch]:
    """A random choice of the images, the same for every model, resized to what the model reads.

    They are normalised by the mean and the deviation in the `preprocessor_config.json` beside the model, otherwise to
    -1 to 1.
    """
    config = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    path = Path(folder) / _PREPROCESSOR
    content = json.loads(path.read_text()) if path.exists() else {}
    mean, std = (torch.tensor(content.get(name, [0.5] * config.num_channels)) for name in ("image_mean", "image_std"))
    order = np.random.default_rng(0).permutation(len(images))[:num_images].tolist()
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[config.num_channels]
    pixels = torch.stack([_pixels(images[index], width, height, mode) for index in order])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return [InputBatch({"pixel_values": part}) for part in torch.split(pixels, batch_size)]


def _pixels(stored: _Stored, width: int, height: int, mode: str) -> Float[Tensor, "c y x"]:
    """An image as numbers from 0 to 1."""
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            small = image.convert(mode).resize((width, height), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        place = "a row" if isinstance(stored, bytes) else str(stored)
        raise ValueError(f"{place} is no image that can be read ({error}); remove it") from error
    values = torch.from_numpy(np.array(small, dtype=np.float32) / 255)
    return values.reshape(height, width, -1).permute(2, 0, 1)
