"""Split text into training and held-out text by whole documents; a single document is cut in two."""

from collections.abc import Callable
from typing import NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from gated_attention.train.text.corpus import load_documents, say_passed_over


class Text(NamedTuple):
    """Documents in reading order, and their size in bytes of UTF-8."""

    documents: datasets.Dataset
    num_bytes: int


def split_text(
    source: str, validation: str | None, held_out: float, text_field: str, seed: int, say: Callable[[str], None]
) -> tuple[Text, Text]:
    """Training and held-out text, both shuffled, without a document in common.

    `validation` is held out. Without it, as few documents of the source as contain the share of its bytes are held out;
    if the source is a single document, its last lines are.

    Raises:
        ValueError: if a source cannot be read, or nothing is left to train on or to hold out.
    """
    documents, column, order = _load(source, text_field, seed, say)
    if validation is None and len(order) == 1:
        return _cut(documents[0], source, held_out, say)
    num_bytes = _num_bytes(column)
    if validation is None:
        from_end = np.cumsum(num_bytes[order][::-1])
        num_held_out = int(np.searchsorted(from_end, held_out * from_end[-1])) + 1
        kept, held = np.split(order, [max(1, len(order) - num_held_out)])
        other, other_column = documents, column
    else:
        kept = order
        other, other_column, held = _load(validation, text_field, seed, say)
    is_held_out = np.zeros(len(other_column), dtype=bool)
    is_held_out[held] = True
    held_out_text = other_column.filter(pa.array(is_held_out)).cast(column.type)
    is_copy = pc.is_in(column, value_set=held_out_text).to_numpy()[kept]
    if is_copy.all():
        raise ValueError(f"every document of {source} is held out as well; give other text for validation")
    if is_copy.any():
        say(f"leaving out {is_copy.sum():,} training documents that are held out as well")
    kept = kept[~is_copy]
    train = Text(documents.select(kept), int(num_bytes[kept].sum()))
    return train, Text(other.select(held), int(_num_bytes(held_out_text).sum()))


def _load(
    source: str, text_field: str, seed: int, say: Callable[[str], None]
) -> tuple[datasets.Dataset, pa.ChunkedArray, npt.NDArray[np.int64]]:
    """The documents of a source in their own order, their text as an Arrow column, and a shuffled order."""
    documents = load_documents(source, text_field)
    say_passed_over(source, say)
    return documents, documents.data.column("text"), np.random.default_rng(seed).permutation(len(documents))


def _num_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.binary_length(column), dtype=np.int64)


def _cut(document: dict[str, str], source: str, share: float, say: Callable[[str], None]) -> tuple[Text, Text]:
    whole = document["text"]
    if len(whole) < 2:
        raise ValueError(f"{source} is one character; give more text")
    at = min(len(whole) - 1, max(1, round(len(whole) * (1 - share))))
    line = whole.rfind("\n", 0, at) + 1
    if line and at - line < len(whole) - at:  # otherwise a long line would more than double what is held out
        at = line
    say(f"one document: holding out its last {100 * (len(whole) - at) / len(whole):.1f} %")
    train, held_out = (
        Text(datasets.Dataset.from_list([{**document, "text": part}]), len(part.encode()))
        for part in (whole[:at], whole[at:])
    )
    return train, held_out
