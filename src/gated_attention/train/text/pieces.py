"""Documents in pieces of bounded length, and their token ids."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TextIO, TypeVar

from transformers import PreTrainedTokenizerBase

from gated_attention.train.text.tokenizer import text_core

_PIECE_CHARACTERS = 1_000_000  # longer documents are tokenised in pieces, cut at line ends
_BATCH_CHARACTERS = 2_000_000  # text per call of the tokenizer, which spreads it over all cores

Encode = Callable[[list[str]], list[list[int]]]


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


_Piece = TypeVar("_Piece", bound=_HasText)


def pieces(document: TextIO) -> Iterator[tuple[str, bool]]:
    """A document in pieces, each with whether the document ends there; none if it is empty."""
    held = document.read(_PIECE_CHARACTERS + 1)
    while len(held) > _PIECE_CHARACTERS:
        cut = held.rfind("\n", 0, _PIECE_CHARACTERS) + 1 or _PIECE_CHARACTERS
        yield held[:cut], False
        held = held[cut:] + document.read(cut)
    if held:
        yield held, True


def batches(stream: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in batches for one call of the tokenizer."""
    batch, size = list[_Piece](), 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Text to ids: nothing is added or cut, and a special token inside a document is only text."""
    core = text_core(tokenizer)
    if core is None:
        return lambda texts: [
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False) for text in texts
        ]
    return lambda texts: [row.ids for row in core.encode_batch_fast(texts, add_special_tokens=False)]
