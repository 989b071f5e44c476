"""From Parquet files of labelled images to batches: read once, held out, cropped and mirrored at random in training."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gated_attention.files import new_folder, waiting_for, writing_to
from gated_attention.ranges import require_within
from gated_attention.train.images.decode import Stored, decode
from gated_attention.train.text.corpus import file_state

_FORMAT = 1  # of the cached files
_SHIFT = 8  # images are shifted by up to one part in this many of their size
_CURVE_IMAGES = 2_000  # held-out images scored for each point of a validation curve
_ABOUT_NAME = "about.json"

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Which images a model reads, and how.

    Attributes:
        source: A Parquet file, or a folder of them; a row has an image and a label.
        validation: The same for held-out images; None holds out images of `source`.
        held_out: Share of the images that is held out when `validation` is None.
        image_field, label_field: Columns: encoded images, as bytes or as `datasets` stores them, and whole numbers or
            names.
        image_size: Height and width to which images of other sizes are resized.
        block_size: Patches per image, a square.
        seed: Determines which images are held out.
    """

    source: str
    validation: str | None = None
    held_out: float = 0.1
    image_field: str = "image"
    label_field: str = "label"
    image_size: int = 32
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_within("held_out", self.held_out, above=0, below=1)
        side = isqrt(self.block_size)
        if side**2 != self.block_size or self.image_size % side:
            raise ValueError(f"{self.block_size} patches do not tile an image of {self.image_size} x {self.image_size}")


class Images(Dataset[Batch]):
    """Labelled images, (N, H, W, channels) from 0 to 255.

    Args:
        augment: Whether a batch shifts and mirrors images at random. Numbers beyond N are then images again, drawn
            otherwise, so that every pass over the data has numbers of its own.
    """

    def __init__(
        self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], seed: int = 0, *, augment: bool = False
    ) -> None:
        self.pixels, self.labels, self.seed, self.varies = pixels, labels, seed, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Batch:
        return {name: values[0] for name, values in self.batch([number]).items()}

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """What PyTorch's loaders ask for instead of one item after another."""
        return self.batch(numbers)

    def sample(self, num_images: int) -> "Images":
        """Evenly spaced images, all if there are no more."""
        count = min(len(self), num_images)
        chosen = np.arange(count) * len(self) // count
        return Images(np.asarray(self.pixels)[chosen], self.labels[chosen], self.seed)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(len(self), start + batch_size)))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Inputs of a classifier: pixels from -1 to 1, (B, channels, H, W), and labels, (B,).

        What is random follows from the seed and the numbers alone, so that arms and resumed runs see the same.
        """
        rows = np.asarray(numbers) % len(self)
        pixels, labels = np.asarray(self.pixels[rows]), self.labels[rows]
        if self.varies:
            pixels = _vary(pixels, np.random.default_rng([self.seed, *map(int, numbers)]))
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
        return {"pixel_values": scaled, "labels": torch.from_numpy(labels)}


def collate_images(batch: Batch) -> Batch:
    """What a loader makes of `Images.__getitems__`, which is a batch already."""
    return batch


def _vary(pixels: npt.NDArray[np.uint8], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Each image shifted by up to an eighth of its size, its edge repeated, and mirrored in half of the cases."""
    count, height, width, _ = pixels.shape
    shifts = random.integers(-(height // _SHIFT), height // _SHIFT + 1, (2, count, 1))
    mirrored = random.integers(0, 2, (count, 1)) == 1
    rows = np.clip(np.arange(height) + shifts[0], 0, height - 1)  # (B, H)
    columns = np.clip(np.arange(width) + shifts[1], 0, width - 1)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    places = (np.arange(count)[:, None, None] * height + rows[:, :, None]) * width + columns[:, None]  # (B, H, W)
    found: npt.NDArray[np.uint8] = np.take(pixels.reshape(-1, pixels.shape[-1]), places, axis=0)
    return found


@dataclass(frozen=True, slots=True)
class ImageData:
    """Images ready for training.

    Attributes:
        labels: Names of the classes.
        about: Images of each part.
    """

    train: Images
    validation: Images
    labels: tuple[str, ...]
    about: dict[str, int]
    kind: ClassVar = "images"

    @property
    def validation_sample(self) -> Images:
        """The held-out images that each point of a validation curve is scored on."""
        return self.validation.sample(_CURVE_IMAGES)


def load_images(config: ImageConfig, cache: Path, say: Callable[[str], None] = lambda message: None) -> ImageData:
    """Decoded images, from the cache if they were decoded before; it is keyed by the settings and the files' states.

    Raises:
        ValueError: if a file or a row cannot be read, or there are too few images or labels.
    """
    files = {part: parquet_files(source) for part, source in _sources(config).items()}
    states = {part: [file_state(path) for path in paths] for part, paths in files.items()}
    key = json.dumps({"format": _FORMAT, "config": asdict(config), "files": states}, sort_keys=True)
    folder = cache / "images" / hashlib.sha256(key.encode()).hexdigest()[:20]
    if not folder.exists():
        lock = folder.with_name(f".{folder.name}.lock")
        with writing_to(f"the cache {cache}", "free space or set XDG_CACHE_HOME"), waiting_for(lock, say):
            if not folder.exists():
                with new_folder(folder) as part:
                    _store(config, files, part, say)
    about = json.loads((folder / _ABOUT_NAME).read_text(encoding="utf-8"))
    parts = {
        name: (np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}-labels.npy"))
        for name in ("train", "validation")
    }
    return ImageData(
        train=Images(*parts["train"], config.seed, augment=True),
        validation=Images(*parts["validation"]),
        labels=tuple(about.pop("labels")),
        about=about,
    )


def parquet_files(source: str) -> list[Path]:
    """A Parquet file, or those of a folder in order of their paths.

    Raises:
        ValueError: if there is none.
    """
    path = Path(os.path.expanduser(source))
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise ValueError(f"no Parquet file at {source!r}; give --data a Parquet file of images and labels, or a folder")
    return found


def _sources(config: ImageConfig) -> dict[str, str]:
    held_out = {} if config.validation is None else {"validation": config.validation}
    return {"train": config.source, **held_out}


def _store(config: ImageConfig, files: dict[str, list[Path]], folder: Path, say: Callable[[str], None]) -> None:
    parts = {}
    for part, paths in files.items():
        say(f"reading the images of {', '.join(path.name for path in paths)}")
        parts[part] = [row for path in paths for row in _rows(path, config)]
    if "validation" not in parts:
        order = np.random.default_rng(config.seed).permutation(len(parts["train"]))
        count = max(1, round(config.held_out * len(order)))
        everything = parts["train"]
        parts = {
            "train": [everything[index] for index in np.sort(order[count:])],
            "validation": [everything[index] for index in np.sort(order[:count])],
        }
    labels = sorted({label for _, label in parts["train"]}, key=lambda label: (len(label), label))
    if len(labels) < 2:
        raise ValueError(f"{config.source} has {len(labels)} label; give images of at least 2 classes")
    places, size = {label: index for index, label in enumerate(labels)}, config.image_size
    about: dict[str, object] = {"labels": labels}
    for part, rows in parts.items():
        if unknown := next((label for _, label in rows if label not in places), None):
            raise ValueError(f"a held-out image has label {unknown!r}, which no training image has")
        pixels = np.lib.format.open_memmap(
            folder / f"{part}.npy", mode="w+", dtype=np.uint8, shape=(len(rows), size, size, 3)
        )
        for index, (stored, _) in enumerate(rows):
            pixels[index] = decode(stored, size, size)
        pixels.flush()
        np.save(folder / f"{part}-labels.npy", np.array([places[label] for _, label in rows], np.int64))
        about[f"{part}_images"] = len(rows)
    (folder / _ABOUT_NAME).write_text(json.dumps(about), encoding="utf-8")


def _rows(path: Path, config: ImageConfig) -> Iterator[tuple[Stored, str]]:
    fields = [config.image_field, config.label_field]
    try:
        names = pq.read_schema(path).names
        missing = next((field for field in fields if field not in names), None)
        table = None if missing else pq.read_table(path, columns=fields)
    except (OSError, ValueError) as error:  # pyarrow's are of these kinds
        raise ValueError(f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from error
    if table is None:
        raise ValueError(f"{path} has no column {missing!r}; it has {', '.join(names)}")
    for row in table.to_pylist():
        stored, label = row[config.image_field], row[config.label_field]
        stored = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(stored, bytes) or label is None:
            raise ValueError(f"{path} has a row without an encoded image and a label; remove it")
        yield stored, str(label)
