"""Split text into training and held-out text by whole documents; a single document is cut in two."""

from collections.abc import Callable
from typing import NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from gated_attention.train.text.corpus import load_documents, say_passed_over
from gated_attention.train.text.token_documents import TokenDocuments


class Text(NamedTuple):
    """Documents in reading order, and their size in bytes of UTF-8."""

    documents: datasets.Dataset | TokenDocuments
    num_bytes: int


class _Loaded(NamedTuple):
    """All documents of a source in their own order.

    Attributes:
        keys: The text of each, or what stands for it: equal for equal documents.
        num_bytes: The size of each, (documents,).
        order: A shuffled one.
    """

    documents: datasets.Dataset | TokenDocuments
    keys: pa.ChunkedArray
    num_bytes: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]


def split_text(
    source: str,
    validation: str | None,
    held_out: float,
    text_field: str,
    seed: int,
    say: Callable[[str], None],
    read_tokens: Callable[[str], TokenDocuments] | None = None,
) -> tuple[Text, Text]:
    """Training and held-out text, both shuffled, without a document in common.

    `validation` is held out. Without it, as few documents of the source as contain the share of its bytes are held out;
    if the source is a single document, its last lines are.

    Args:
        read_tokens: Reads a source as tokens; None reads text.

    Raises:
        ValueError: if a source cannot be read, or nothing is left to train on or to hold out.
    """

    def load(name: str) -> _Loaded:
        return _load_tokens(read_tokens(name), seed) if read_tokens else _load_text(name, text_field, seed, say)

    documents, keys, num_bytes, order = load(source)
    if validation is None and len(order) == 1:
        if isinstance(documents, TokenDocuments):
            raise ValueError(f"{source} holds the tokens of one document, which are not cut; give --validation")
        return _cut(documents[0], source, held_out, say)
    if validation is None:
        from_end = np.cumsum(num_bytes[order][::-1])
        num_held_out = int(np.searchsorted(from_end, held_out * from_end[-1])) + 1
        kept, held = np.split(order, [max(1, len(order) - num_held_out)])
        other, other_keys, other_bytes = documents, keys, num_bytes
    else:
        kept = order
        other, other_keys, other_bytes, held = load(validation)
    is_held_out = np.zeros(len(other_keys), dtype=bool)
    is_held_out[held] = True
    held_out_keys = other_keys.filter(pa.array(is_held_out)).cast(keys.type)
    is_copy = pc.is_in(keys, value_set=held_out_keys).to_numpy()[kept]
    if is_copy.all():
        raise ValueError(f"every document of {source} is held out as well; give other text for validation")
    if is_copy.any():
        say(f"leaving out {is_copy.sum():,} training documents that are held out as well")
    kept = kept[~is_copy]
    train = Text(documents.select(kept), int(num_bytes[kept].sum()))
    return train, Text(other.select(held), int(other_bytes[held].sum()))


def _load_text(source: str, text_field: str, seed: int, say: Callable[[str], None]) -> _Loaded:
    documents = load_documents(source, text_field)
    say_passed_over(source, say)
    column = documents.data.column("text")
    num_bytes = np.asarray(pc.binary_length(column), dtype=np.int64)
    return _Loaded(documents, column, num_bytes, _shuffled(len(documents), seed))


def _load_tokens(documents: TokenDocuments, seed: int) -> _Loaded:
    return _Loaded(documents, documents.keys(), documents.num_bytes, _shuffled(len(documents), seed))


def _shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


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
