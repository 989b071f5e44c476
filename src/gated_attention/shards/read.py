"""Finished folders of token shards."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gated_attention.shards.index import (
    CURE,
    INDEX,
    INDEX_NAME,
    TOKENIZER_NAME,
    UNFINISHED_NAME,
    ArrayType,
    TokenIndex,
    array_type,
    table_path,
)
from gated_attention.typed import parse, read_bytes

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class TokenShards:
    """A finished folder of token shards."""

    folder: Path
    index: TokenIndex

    @property
    def paths(self) -> list[Path]:
        """The files of token ids, in order."""
        return [self.folder / shard.name for shard in self.index.shards]

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.folder / TOKENIZER_NAME

    @property
    def dtype(self) -> ArrayType:
        """Of the token ids, little-endian."""
        return array_type(self.index.dtype)

    @cached_property
    def ids(self) -> list[Ids]:
        """The token ids of each shard, mapped from its file."""
        return [np.memmap(path, self.dtype, mode="r") for path in self.paths]

    def table(self, number: int) -> npt.NDArray[np.int64]:
        """The documents of one shard, (documents, 3): first id, one past the EOS, bytes of text.

        Raises:
            ValueError: if the table cannot be read or is not that of the shard.
        """
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import csv

        shard, path = self.index.shards[number], table_path(self.paths[number])
        names = ("start", "end", "bytes")
        try:
            found = csv.read_csv(
                path,
                read_options=csv.ReadOptions(column_names=names),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64())),
            )
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read ({reason}); {CURE}") from error
        table = np.stack([np.asarray(found[name]) for name in names], axis=1)
        starts, ends, sizes = table.T
        fits = len(table) == shard.documents and ends[-1] == shard.tokens and sizes.sum() == shard.bytes
        if not fits or starts[0] != 0 or (starts[1:] != ends[:-1]).any() or (starts >= ends).any():
            raise ValueError(
                f"{path} is not the table of {shard.documents:,} documents that {INDEX_NAME} names; {CURE}"
            )
        return table

    def verify(self) -> None:
        """Read every shard, and compare its checksum with the index.

        Raises:
            ValueError: if one differs.
        """
        for path, shard in zip(self.paths, self.index.shards, strict=True):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise ValueError(f"{path} is damaged: its checksum is not the one in {INDEX_NAME}; {CURE}")


def is_token_folder(name: str | Path) -> bool:
    """Whether a folder holds token shards, finished or not."""
    folder = Path(name).expanduser()
    return (folder / INDEX_NAME).is_file() or (folder / UNFINISHED_NAME).is_file()


def open_shards(name: str | Path) -> TokenShards:
    """A folder of token shards; its files are there and have the sizes that the index says, their content is not read.

    Raises:
        ValueError: if the folder is not finished, or a file is missing, short or of another format.
    """
    folder = Path(name).expanduser()
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"{folder} has no {INDEX_NAME}; give a folder that gated-attention tokenize has finished")
    index = parse(INDEX, read_bytes(folder / INDEX_NAME, CURE), folder / INDEX_NAME, CURE)
    shards = TokenShards(folder, index)
    for path, shard in zip(shards.paths, index.shards, strict=True):
        wanted = shard.tokens * shards.dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            size = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(f"{path} {size}, and {INDEX_NAME} says {wanted:,} bytes; {CURE}")
        if not table_path(path).is_file():
            raise ValueError(f"{table_path(path)} is missing; {CURE}")
    if not shards.tokenizer.is_dir():
        raise ValueError(f"{shards.tokenizer} is missing; {CURE}")
    return shards
