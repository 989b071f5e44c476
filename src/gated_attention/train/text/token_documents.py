"""The documents of token shards in the place of text: in any order, and compared by their ids."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from gated_attention.shards import TokenShards
from gated_attention.train.text.blocks import Ids
from gated_attention.train.text.tokenizer import fingerprint, load_tokenizer

_GATHERED = 1_000  # documents that are put together at a time


@dataclass(frozen=True, slots=True)
class TokenDocuments:
    """Some documents of token shards.

    Attributes:
        table: The shard of each document, its first id, one past its EOS, and bytes of its text, (documents, 4).
    """

    shards: TokenShards
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
        found = self.shards.ids
        digests = [blake2b(found[at][start:end].tobytes(), digest_size=16).digest() for at, start, end, _ in self.table]
        return pa.chunked_array([pa.array(digests, pa.binary(16))])

    def batches(self, dtype: np.dtype[np.generic], inserted: int | None) -> Iterator[Ids]:
        """The ids of all documents, EOS after each, and after that `inserted` if it is not None."""
        found = self.shards.ids
        end_of = [] if inserted is None else [np.array([inserted], dtype)]
        for first in range(0, len(self), _GATHERED):
            rows = self.table[first : first + _GATHERED]
            yield np.concatenate(
                [part for at, start, end, _ in rows for part in (found[at][start:end], *end_of)]
            ).astype(dtype, copy=False)


def all_documents(shards: TokenShards) -> TokenDocuments:
    """Every document, in order.

    Raises:
        ValueError: if a table cannot be read.
    """
    tables = [np.insert(shards.table(number), 0, number, axis=1) for number in range(len(shards.paths))]
    return TokenDocuments(shards, np.concatenate(tables))


def require_tokenizer(shards: TokenShards, name: str) -> None:
    """Refuse another tokenizer than that of the shards, which may also go by the name that they were written with.

    Raises:
        ValueError: if it is another, or cannot be loaded.
    """
    own = shards.index.tokenizer
    if name in (own.name, str(shards.tokenizer)):
        return
    cure = f"leave out --tokenizer, or choose {shards.tokenizer}"
    if name.startswith("bpe-") or fingerprint(load_tokenizer(name)) != own.sha256:
        raise ValueError(f"{shards.folder} holds tokens of the tokenizer {own.name!r}, not of {name!r}; {cure}")
