"""Token shards: a folder of token ids that `gated-attention tokenize` writes and every trainer reads.

| file | what it holds |
|---|---|
| `part-00000.npy`, ... | token ids and nothing else: little-endian, no header (`np.memmap`, not `np.load`) |
| `part-00000.csv.gz`, ... | per document `start,end,bytes`: first id, one past its EOS, size of its text in UTF-8 |
| `tokenizer/` | the tokenizer, as `save_pretrained` wrote it |
| `tokens.json` | the index, a `TokenIndex`, written last: a folder without it is not finished |

Ids are `uint16` where the vocabulary fits, `uint32` otherwise. Documents stand in the order of their sources, each
followed by `eos_token_id`. A document lies whole in one shard. There is no BOS and no padding: a trainer that wants BOS
inserts it, and a reader finds documents by EOS alone, or by the tables.

OLMo-core's `NumpyFSLDataset` and its kin read the parts as they are, and the tables as the metadata of
documents. For its `TokenizerConfig`, take `bos_token_id=None`, because its readers otherwise expect a BOS at every
document, and for a tokenizer without padding `pad_token_id=eos_token_id`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, with_config

from gated_attention.typed import parse, read_bytes

INDEX_NAME = "tokens.json"
TOKENIZER_NAME = "tokenizer"

FORMAT = 1
"""Version of the folder; raised when a field or a file changes its meaning."""

_CLOSED = ConfigDict(extra="forbid")
_CURE = "write it again with gated-attention tokenize"

Count = Annotated[int, Field(ge=0)]
TokenType = Literal["uint16", "uint32"]


@with_config(_CLOSED)
@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer of a folder.

    Attributes:
        name: As it was asked for: `bytes`, `bpe-N`, a folder or a hub name.
        sha256: `train.text.tokenizer.fingerprint`; equal for tokenizers that make the same ids of every text.
        vocab_size: One more than the largest id, not padded.
        bos_token_id: None if there is none. It stands nowhere in the shards.
        pad_token_id: None if there is none.
    """

    name: str
    sha256: str
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eos_token_id: Count
    bos_token_id: Count | None
    pad_token_id: Count | None


@with_config(_CLOSED)
@dataclass(frozen=True, slots=True)
class Shard:
    """One `part-*.npy`.

    Attributes:
        name: Of the file, within the folder.
        tokens: Ids, one EOS per document among them.
        bytes: Size of the documents' text in UTF-8.
        sha256: Of the file.
    """

    name: Annotated[str, Field(pattern=r"^part-\d{5,}\.npy$")]
    documents: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    bytes: Count
    sha256: str


@with_config(_CLOSED)
@dataclass(frozen=True, slots=True)
class TokenIndex:
    """What `tokens.json` holds.

    Attributes:
        sources: What was tokenised, in order, as it was asked for.
        text_field: The field that held the text in JSON, Parquet and hub data sets.
        shard_tokens: A shard ends with the first document that brings it to so many tokens.
        shards: In the order of the documents.
    """

    format: Literal[1]
    tokenizer: TokenizerRecord
    dtype: TokenType
    sources: tuple[str, ...]
    text_field: str
    shard_tokens: Annotated[int, Field(ge=1)]
    documents: Count
    tokens: Count
    bytes: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        for what in ("documents", "tokens", "bytes"):
            if (total := sum(getattr(shard, what) for shard in self.shards)) != getattr(self, what):
                raise ValueError(f"{what} is {getattr(self, what)}, and the shards have {total}")
        if self.dtype != token_type(self.tokenizer.vocab_size):
            raise ValueError(f"dtype is {self.dtype}, which is not that of {self.tokenizer.vocab_size} tokens")


INDEX = TypeAdapter(TokenIndex)


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
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Of the token ids, little-endian."""
        return array_type(self.index.dtype)

    @cached_property
    def ids(self) -> list[npt.NDArray[np.uint16] | npt.NDArray[np.uint32]]:
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
            raise ValueError(f"{path} cannot be read ({reason}); {_CURE}") from error
        table = np.stack([np.asarray(found[name]) for name in names], axis=1)
        starts, ends, sizes = table.T
        fits = len(table) == shard.documents and ends[-1] == shard.tokens and sizes.sum() == shard.bytes
        if not fits or starts[0] != 0 or (starts[1:] != ends[:-1]).any() or (starts >= ends).any():
            raise ValueError(
                f"{path} is not the table of {shard.documents:,} documents that {INDEX_NAME} names; {_CURE}"
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
                    raise ValueError(f"{path} is damaged: its checksum is not the one in {INDEX_NAME}; {_CURE}")


def is_token_folder(name: str | Path) -> bool:
    """Whether a folder holds finished token shards."""
    return (Path(name).expanduser() / INDEX_NAME).is_file()


def open_shards(name: str | Path) -> TokenShards:
    """A folder of token shards; its files are there and have the sizes that the index says, their content is not read.

    Raises:
        ValueError: if the folder is not finished, or a file is missing, short or of another format.
    """
    folder = Path(name).expanduser()
    if not is_token_folder(folder):
        raise ValueError(f"{folder} has no {INDEX_NAME}; give a folder that gated-attention tokenize has finished")
    index = parse(INDEX, read_bytes(folder / INDEX_NAME, _CURE), folder / INDEX_NAME, _CURE)
    shards = TokenShards(folder, index)
    for path, shard in zip(shards.paths, index.shards, strict=True):
        wanted = shard.tokens * shards.dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            size = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(f"{path} {size}, and {INDEX_NAME} says {wanted:,} bytes; {_CURE}")
        if not table_path(path).is_file():
            raise ValueError(f"{table_path(path)} is missing; {_CURE}")
    if not shards.tokenizer.is_dir():
        raise ValueError(f"{shards.tokenizer} is missing; {_CURE}")
    return shards


def token_type(vocab_size: int) -> TokenType:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def array_type(name: TokenType) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The little-endian type of that name."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def part_name(number: int) -> str:
    """The name of a shard's file."""
    return f"part-{number:05d}.npy"


def table_path(part: Path) -> Path:
    """The table of the documents of a shard's file."""
    return part.with_suffix(".csv.gz")
