"""Pieces of documents into token ids, in several processes and in their order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from gated_attention.processes import follow_parent
from gated_attention.shards.index import ArrayType
from gated_attention.shards.read import Ids
from gated_attention.train.text.pieces import Encode, batches, encoder
from gated_attention.train.text.stream import Piece
from gated_attention.train.text.tokenizer import load_tokenizer

_WAITING = 3  # batches per process that are encoded or wait for it; bounds the memory


class _Encoded(NamedTuple):
    """The ids of a batch of pieces, and for each piece where they end and the bytes of its text."""

    ids: Ids
    ends: npt.NDArray[np.int64]
    sizes: list[int]

    def split(self, batch: list[Piece]) -> Iterator[tuple[Piece, Ids, int]]:
        rows = cast(list[Ids], np.split(self.ids, self.ends[:-1]))
        return zip(batch, rows, self.sizes, strict=True)


def encode_in_order(
    pieces: Iterable[Piece], tokenizer: Path, dtype: ArrayType, processes: int
) -> Iterator[tuple[Piece, Ids, int]]:
    """Every piece with its ids and the bytes of its text in UTF-8; EOS follows the last piece of each document.

    Args:
        tokenizer: Its folder.
        processes: One process lets the tokenizer use all cores as threads; more use a core each.

    Raises:
        RuntimeError: if a process is killed.
    """
    texts = batches(pieces)
    if processes == 1:
        encode, end = _open(tokenizer)
        for batch in texts:
            yield from _encode(encode, end, [(piece.text, piece.is_end) for piece in batch], dtype).split(batch)
        return
    context = multiprocessing.get_context("forkserver")  # one process imports, and the others are its copies
    context.set_forkserver_preload([__name__])
    waiting = deque[tuple[list[Piece], Future[_Encoded]]]()
    with ProcessPoolExecutor(processes, context, _enter, (tokenizer,)) as pool:
        try:
            while True:
                for batch in islice(texts, _WAITING * processes - len(waiting)):
                    waiting.append((batch, pool.submit(_work, [(piece.text, piece.is_end) for piece in batch], dtype)))
                if not waiting:
                    return
                batch, future = waiting.popleft()
                yield from future.result().split(batch)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that tokenised was killed, perhaps for lack of memory; run the command again with fewer"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _open(tokenizer: Path) -> tuple[Encode, int]:
    loaded = load_tokenizer(str(tokenizer))
    return encoder(loaded), int(loaded.eos_token_id)


def _encode(encode: Encode, end: int, texts: Sequence[tuple[str, bool]], dtype: ArrayType) -> _Encoded:
    rows = encode([text for text, _ in texts])
    ends = [[end] if is_end else [] for _, is_end in texts]
    parts = [np.array(row + last, dtype) for row, last in zip(rows, ends, strict=True)]
    return _Encoded(
        np.concatenate(parts), np.cumsum([len(part) for part in parts]), [len(text.encode()) for text, _ in texts]
    )


_opened: tuple[Encode, int]


def _enter(tokenizer: Path) -> None:
    global _opened  # noqa: PLW0603  # a pool's initialiser has no other place for what its tasks need
    follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    _opened = _open(tokenizer)


def _work(texts: Sequence[tuple[str, bool]], dtype: ArrayType) -> _Encoded:
    return _encode(*_opened, texts, dtype)
