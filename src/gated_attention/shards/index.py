"""The index of a folder of token shards, and the names and types of its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config

INDEX_NAME = "tokens.json"
TOKENIZER_NAME = "tokenizer"
UNFINISHED_NAME = "unfinished.json"

FORMAT: Literal[1] = 1
"""Version of the folder; raised when a field or a file changes its meaning."""

CURE = "write it again with gated-attention tokenize"

CLOSED = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=0)]
TokenType = Literal["uint16", "uint32"]
ArrayType = np.dtype[np.uint16] | np.dtype[np.uint32]


@with_config(CLOSED)
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


@with_config(CLOSED)
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


@with_config(CLOSED)
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


def token_type(vocab_size: int) -> TokenType:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def array_type(name: TokenType) -> ArrayType:
    """The little-endian type of that name."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def part_name(number: int) -> str:
    """The name of a shard's file."""
    return f"part-{number:05d}.npy"


def table_path(part: Path) -> Path:
    """The table of the documents of a shard's file."""
    return part.with_suffix(".csv.gz")
