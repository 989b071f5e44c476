"""Which text is trained on and which is held out, by whole documents; a single document is cut in two."""

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from gated_attention.train.text.corpus import load_documents, passed_over


@dataclass(frozen=True, slots=True)
class Text:
    """Documents in the order they are read, and their sizes in bytes of UTF-8."""

    documents: datasets.Dataset
    num_bytes: npt.NDArray[np.int64]

    def select(self, rows: npt.NDArray[np.int64]) -> "Text":
        """The documents of these rows in their order."""
        return Text(self.documents.select(rows), self.num_bytes[rows])


def split_text(
    source: str, validation: str | None, *, held_out: float, text_field: str, seed: int, say: Callable[[str], None]
) -> tuple[Text, Text]:
    """Training and held-out text, both shuffled, without a text in common.

    Held out is `validation`; without one, as few of the source's documents as hold the share of its bytes, or, of a
    source that is one document, its end from a line's beginning on.

    Raises:
        ValueError: if a source cannot be read, or nothing is left to train on or to hold out.
    """
    text, column, order = _load(source, text_field, seed, say)
    if validation is None and len(order) == 1:
        return _cut(text, source, held_out, say)
    if validation is None:
        cut = _first_held_out(text.num_bytes[order], held_out)
        kept, held = order[:cut], order[cut:]
        other, other_column = text, column
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
    return text.select(kept[~is_copy]), other.select(held)


def _load(
    source: str, text_field: str, seed: int, say: Callable[[str], None]
) -> tuple[Text, pa.ChunkedArray, npt.NDArray[np.int64]]:
    """The documents of a source as they lie, their text as an Arrow column, and a shuffled order of them."""
    documents = load_documents(source, text_field)
    if formats := passed_over(source):
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in formats.items())
        say(f"passing over files of other formats in {source}: {listed}")
    column = documents.data.column("text")
    text = _text(documents)
    return text, column, np.random.default_rng(seed).permutation(len(documents))


def _text(documents: datasets.Dataset) -> Text:
    return Text(documents, pc.binary_length(documents.data.column("text")).to_numpy().astype(np.int64))


def _first_held_out(num_bytes: npt.NDArray[np.int64], share: float) -> int:
    """Where the held-out documents begin: as few as hold the share of the text, from the end, but not all."""
    from_end = np.cumsum(num_bytes[::-1])
    num_held_out = int(np.searchsorted(from_end, share * num_bytes.sum())) + 1
    return max(1, len(num_bytes) - num_held_out)


def _cut(text: Text, source: str, share: float, say: Callable[[str], None]) -> tuple[Text, Text]:
    document = text.documents[0]
    whole = document["text"]
    if len(whole) < 2:
        raise ValueError(f"{source} is one character; give more text")
    at = min(len(whole) - 1, max(1, round(len(whole) * (1 - share))))
    line = whole.rfind("\n", 0, at) + 1
    if line and at - line < len(whole) - at:  # else the last line alone would double what is held out
        at = line
    say(f"one document: holding out its last {100 * (len(whole) - at) / len(whole):.1f} %")
    parts = (datasets.Dataset.from_dict({**{key: [value] for key, value in document.items()}, "text": [part]})
             for part in (whole[:at], whole[at:]))  # fmt: skip
    train, held_out = map(_text, parts)
    return train, held_out
