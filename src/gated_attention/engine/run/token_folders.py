"""Token ids as the engine reads them, and the folders of shards that `tokenize` writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, with_config

from gated_attention.typed import parse, read_bytes

INDEX_NAME = "tokens.json"
TOKENIZER_NAME = "tokenizer"
_CURE = "write it again with gated-attention tokenize"
_OPEN = with_config(ConfigDict(extra="ignore"))
_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Files of token ids: little-endian, without a header, EOS after every document.

    Attributes:
        train: Sequences are cut from each file by itself.
        validation: None are held out if it is empty.
        vocab_size: One more than the largest id.
        tokenizer: The folder of the tokenizer, if there is one.
        source: What a record says they were made from.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer: Path | None = None
    source: str = ""

    def sequences(self, paths: Sequence[Path], context: int) -> int:
        """How many whole sequences the files hold."""
        return sum(path.stat().st_size // (np.dtype(self.dtype).itemsize * context) for path in paths)

    def held_out(self, context: int, num_tokens: int) -> npt.NDArray[np.int64]:
        """Evenly spaced held-out sequences of about `num_tokens` in all, (sequences, context)."""
        files = [np.memmap(path, self.dtype, mode="r") for path in self.validation if path.stat().st_size]
        rows = [ids[: len(ids) // context * context].reshape(-1, context) for ids in files]
        counts = np.cumsum([0, *map(len, rows)])
        wanted = min(int(counts[-1]), max(1, num_tokens // context))
        found = np.empty((wanted, context), np.int64)
        for place, row in enumerate(np.arange(wanted) * int(counts[-1]) // max(1, wanted)):
            file = int(np.searchsorted(counts, row, side="right")) - 1
            found[place] = rows[file][row - counts[file]]
        return found


@_OPEN
@dataclass(frozen=True, slots=True)
class _Tokenizer:
    name: str
    vocab_size: Annotated[int, Field(ge=1)]
    eos_token_id: _Count
    sha256: str = ""


@_OPEN
@dataclass(frozen=True, slots=True)
class _Shard:
    name: Annotated[str, Field(pattern=r"^part-\d{5,}\.npy$")]
    tokens: _Count


@_OPEN
@dataclass(frozen=True, slots=True)
class _Index:
    tokenizer: _Tokenizer
    dtype: Literal["uint16", "uint32"]
    shards: tuple[_Shard, ...]


_INDEX = TypeAdapter(_Index)


def read_folders(paths: Sequence[str], validation: str | None = None) -> Tokens:
    """Folders of shards of one tokenizer, each file as large as its index says.

    Raises:
        ValueError: if one is none, is damaged, or has another tokenizer than the first.
    """
    folders = {Path(path): _read(Path(path)) for path in (*paths, *([validation] if validation else []))}
    first, index = next(iter(folders.items()))
    for path, other in folders.items():
        if (other.tokenizer.sha256, other.tokenizer.vocab_size) != (index.tokenizer.sha256, index.tokenizer.vocab_size):
            raise ValueError(
                f"{path} has tokenizer {other.tokenizer.name!r}, {first} {index.tokenizer.name!r}; "
                "tokenize both with the same"
            )

    def parts(names: Sequence[str]) -> tuple[Path, ...]:
        return tuple(Path(name) / shard.name for name in names for shard in folders[Path(name)].shards)

    tokenizer = first / TOKENIZER_NAME
    return Tokens(
        train=parts(paths),
        validation=parts([validation] if validation else []),
        dtype=f"<u{np.dtype(index.dtype).itemsize}",
        vocab_size=index.tokenizer.vocab_size,
        eos_token_id=index.tokenizer.eos_token_id,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        source=", ".join(paths),
    )


def _read(folder: Path) -> _Index:
    place = folder / INDEX_NAME
    if not place.is_file():
        raise ValueError(f"{folder} has no {INDEX_NAME}; give a folder that gated-attention tokenize has finished")
    index = parse(_INDEX, read_bytes(place, _CURE), place, _CURE)
    for shard in index.shards:
        path, wanted = folder / shard.name, shard.tokens * np.dtype(index.dtype).itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != wanted:
            raise ValueError(f"{path} has {found:,} bytes, and {INDEX_NAME} says {wanted:,}; {_CURE}")
    return index
