"""Images from Parquet: what is read, held out and varied, and what is refused."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gated_attention.train.images.data import ImageConfig, Images, load_images
from gated_attention.train.schedule import Passes


def encoded(value, size=32):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 255)).save(file, "PNG")
    return file.getvalue()


def table(tmp_path, rows, name="a.parquet"):
    images, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": list(images), "label": list(labels)}), tmp_path / name)
    return str(tmp_path / name)


def test_images_are_scaled_and_held_out_once(tmp_path):
    rows = [(encoded(value, 32 + value % 2), "cat" if value % 2 else "dog") for value in range(20)]
    table(tmp_path, rows[:10], "a.parquet")
    table(tmp_path, rows[10:], "b.parquet")
    data = load_images(ImageConfig(str(tmp_path)), tmp_path / "cache")
    assert data.labels == ("cat", "dog")
    assert data.about == {"train_images": 18, "validation_images": 2}
    reds = [one.pixels[:, 0, 0, 0].tolist() for one in (data.train, data.validation)]
    assert sorted(reds[0] + reds[1]) == list(range(20))
    (batch,) = data.validation.batches(5)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"][:, 2].unique().tolist() == [1.0]
    assert batch["pixel_values"][:, 1].unique().tolist() == [-1.0]


def test_every_pass_varies_images_by_their_numbers_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    data = Images(pixels, np.arange(4), augment=True)
    first, again, later = (data.batch(numbers)["pixel_values"] for numbers in ([0, 1], [0, 1], [4, 5]))
    assert (first == again).all()
    assert not (first == later).all()
    assert data.batch([4, 5])["labels"].tolist() == [0, 1]
    assert set(first.unique().tolist()) <= set(
        Images(pixels, np.arange(4)).batch([0, 1])["pixel_values"].unique().tolist()
    )
    numbers = list(Passes(data, 10, seed=0))
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert sorted(numbers[4:8]) == [4, 5, 6, 7]
    assert len(numbers) == 10


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(encoded(1), 0), (encoded(2), 0)], "has 1 label; give images of at least 2 classes"),
        ([(encoded(1), 0), (b"no image", 1)], "is no image that can be read"),
        ([(encoded(1), 0), (None, 1)], "has a row without an encoded image and a label"),
    ],
)
def test_images_that_cannot_be_read_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images(ImageConfig(table(tmp_path, rows * 2)), tmp_path / "cache")


def test_columns_and_patches_are_checked(tmp_path):
    config = ImageConfig(table(tmp_path, [(encoded(1), 0), (encoded(2), 1)]), label_field="class")
    with pytest.raises(ValueError, match="has no column 'class'; it has image, label"):
        load_images(config, tmp_path / "cache")
    with pytest.raises(ValueError, match="60 patches do not tile an image of 32 x 32"):
        ImageConfig("x", block_size=60)
