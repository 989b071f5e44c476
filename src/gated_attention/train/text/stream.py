"""The documents of sources as a stream of pieces that can be taken up again in its middle."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gated_attention.train.quiet import quiet
from gated_attention.train.text.corpus import STDLIB, hub_documents, naming, read_file, require_text, source_files
from gated_attention.train.text.files import open_text, text_format
from gated_attention.train.text.pieces import pieces

_READ_DOCUMENTS = 100  # read from a hub data set at a time


class Place(NamedTuple):
    """How far sources are read: this many documents of this file of this source, and all before."""

    source: int = 0
    file: int = 0
    documents: int = 0


START = Place()


class Piece(NamedTuple):
    """A document, or part of a long one.

    Attributes:
        is_end: Whether the document ends here.
        after: Where reading goes on after the document.
    """

    text: str
    is_end: bool
    after: Place


@dataclass(frozen=True, slots=True)
class Source:
    """A source and its files; a hub data set has none."""

    name: str
    files: tuple[Path, ...]


def find_sources(names: Sequence[str]) -> list[Source]:
    """The sources of those names; nothing is read yet.

    Raises:
        ValueError: as `corpus.source_files`, or if one holds token shards.
    """
    for name in names:
        require_text(name)
    return [Source(name, tuple(source_files(name))) for name in names]


def require_outside(folder: Path, source: Source) -> None:
    """Refuse to write into a folder that is read."""
    place = Path(source.name).expanduser()
    if source.name != STDLIB and place.is_dir() and folder.resolve().is_relative_to(place.resolve()):
        raise ValueError(f"{folder} lies within the source {source.name}; choose a folder outside")


def stream_pieces(sources: Sequence[Source], text_field: str, start: Place = START) -> Iterator[Piece]:
    """The documents of sources in order, as `corpus.load_documents` finds them; those before `start` are passed over.

    Holds one piece of a plain text, one line of JSON lines, a row group of Parquet or a whole JSON array in memory.

    Raises:
        ValueError: as `corpus.load_documents`, when the fault is reached.
    """
    for number, source in enumerate(sources[start.source :], start.source):
        is_empty = start == Place(number) or number > start.source
        for at, documents in enumerate(_files(source, text_field)):
            if (number, at) < start[:2]:
                continue
            for count, document in enumerate(documents, start=1):
                after = Place(number, at, count)
                if after <= start:
                    continue
                for text, is_end in document:
                    is_empty = False
                    yield Piece(text, is_end, after)
        if is_empty:
            raise ValueError(f"{source.name} holds no text; give another source")


def _files(source: Source, text_field: str) -> Iterator[Iterator[Iterator[tuple[str, bool]]]]:
    """The documents of each file in pieces; a file is opened when its documents are asked for."""
    if not source.files:
        yield (pieces(io.StringIO(text)) for text in _hub_texts(source.name, text_field))
    for file in source.files:
        if text_format(file) == "text" and source.name != STDLIB:
            yield iter((_text_file(file),))
        else:
            yield (pieces(io.StringIO(row["text"])) for row in read_file(file, source.name, text_field))


def _text_file(file: Path) -> Iterator[tuple[str, bool]]:
    with naming(file), open_text(file) as stream:
        yield from pieces(stream)


def _hub_texts(name: str, text_field: str) -> Iterator[str]:
    with quiet():
        documents = hub_documents(name, text_field).select_columns(text_field)
    for rows in documents.iter(batch_size=_READ_DOCUMENTS):
        yield from filter(None, rows[text_field])
