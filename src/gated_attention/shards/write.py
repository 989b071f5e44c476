"""One shard after the other, each written whole or not at all."""

import gzip
import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from gated_attention.files import replacing
from gated_attention.shards.index import Shard, part_name, table_path
from gated_attention.shards.read import Ids


class ShardWriter:
    """Writes documents into a shard; `close` puts its files in their places, any other end removes them."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / part_name(number)
        self.tokens = 0
        self._ends: list[int] = []
        self._sizes: list[int] = [0]
        self._sum = hashlib.sha256()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._stack.enter_context(replacing(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, ids: Ids, num_bytes: int, *, is_end: bool) -> None:
        """Add ids of a document, or of a part of it; the last one carries its EOS."""
        content = ids.tobytes()
        self._file.write(content)
        self._sum.update(content)
        self.tokens += len(ids)
        self._sizes[-1] += num_bytes
        if is_end:
            self._ends.append(self.tokens)
            self._sizes.append(0)

    @property
    def documents(self) -> int:
        """How many are whole."""
        return len(self._ends)

    def close(self) -> Shard:
        """Write the table, then let the shard take its place; the record of both."""
        sizes = self._sizes[:-1]
        rows = zip([0, *self._ends[:-1]], self._ends, sizes, strict=True)
        with replacing(table_path(self.path)) as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
            packed.write("".join(f"{start},{end},{size}\n" for start, end, size in rows).encode())
        self._stack.close()
        return Shard(self.path.name, self.documents, self.tokens, sum(sizes), self._sum.hexdigest())
