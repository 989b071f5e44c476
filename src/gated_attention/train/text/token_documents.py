"""The documents of token shards in the place of text: in any order, and compared by their ids."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from gated_attention.shards import TokenShards
from gated_attention.shards.mixture import Mixture
from gated_attention.shards.read import Ids
from gated_attention.train.text.tokenizer import fingerprint, load_tokenizer

_GATHERED = 1_000  # documents that are put together at a time


@dataclass(frozen=True, slots=True)
class TokenDocuments:
    """Some documents of token shards.

    Attributes:
        ids: The token ids of every shard.
        table: The shard of each document, its first id, one past its EOS, and bytes of its text, (documents, 4).
    """

    ids: list[Ids]
    table: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_bytes(self) -> npt.NDArray[np.int64]:
        """Size of the text of each."""
        return self.table[:, 3]

    def select(self, indices: npt.NDArray[np.int64]) -> "TokenDocuments":
        """Those documents in that order."""
        return replace(self, table=self.table[indices])

    def keys(self) -> pa.ChunkedArray:
        """A digest of the ids of each document."""
        digests = [
            blake2b(self.ids[at][start:end].tobytes(), digest_size=16).digest() for at, start, end, _ in self.table
        ]
        return pa.chunked_array([pa.array(digests, pa.binary(16))])

    def batches(self, dtype: np.dtype[np.generic], inserted: int | None) -> Iterator[npt.NDArray[Any]]:
        """The ids of all documents, EOS after each, and after that `inserted` if it is not None."""
        end_of = [] if inserted is None else [np.array([inserted], dtype)]
        for first in range(0, len(self), _GATHERED):
            rows = self.table[first : first + _GATHERED]
            yield np.concatenate(
                [part for at, start, end, _ in rows for part in (self.ids[at][start:end], *end_of)]
            ).astype(dtype, copy=False)


def mixed_documents(mixture: Mixture, seed: int) -> TokenDocuments:
    """The documents of token shards in order; of several folders as many as their shares of the tokens allow.

    The folder that is scarce for its share is read whole. Of each other, documents are drawn until it has its share.

    Raises:
        ValueError: if a table cannot be read.
    """
    tables, ids = [], list[Ids]()
    for shards, _ in mixture:
        found = [np.insert(shards.table(at), 0, len(ids) + at, axis=1) for at in range(len(shards.paths))]
        tables.append(np.concatenate(found))
        ids += shards.ids
    most = min(shards.index.tokens / share for shards, share in mixture)
    drawn = [_draw(table, share * most, seed) for table, (_, share) in zip(tables, mixture, strict=True)]
    return TokenDocuments(ids, np.concatenate(drawn))


def _draw(table: npt.NDArray[np.int64], num_tokens: float, seed: int) -> npt.NDArray[np.int64]:
    """Documents that reach so many tokens, in their order."""
    order = np.random.default_rng(seed).permutation(len(table))
    so_far = np.cumsum((table[:, 2] - table[:, 1])[order])
    return table[np.sort(order[: np.searchsorted(so_far, num_tokens * (1 - 1e-12)) + 1])]


def require_tokenizer(shards: TokenShards, name: str) -> None:
    """Refuse another tokenizer than that of the shards, which may also go by the name that they were written with.

    Raises:
        ValueError: if it is another, or cannot be loaded.
    """
    own = shards.index.tokenizer
    if name in (own.name, str(shards.tokenizer)):
        return
    cure = f"choose {shards.tokenizer}, or write the shards again with --tokenizer {name}"
    if name.startswith("bpe-") or fingerprint(load_tokenizer(name)) != own.sha256:
        raise ValueError(f"{shards.folder} holds tokens of the tokenizer {own.name!r}, not of {name!r}; {cure}")
