"""What is written of token shards before the index: how far the sources are read, and which shards that made."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter, with_config

from gated_attention.files import LOCK_NAME, PART, write_text
from gated_attention.ranges import require_within
from gated_attention.shards.index import CLOSED, TOKENIZER_NAME, UNFINISHED_NAME, Shard, TokenIndex, table_path
from gated_attention.typed import first_difference, parse, read_bytes

SHARD_TOKENS = 100_000_000
"""Tokens of a shard unless said otherwise: 200 or 400 MB, and what a killed process does again."""

_CURE = "remove the folder to begin again"

FileState = tuple[str, int, int]


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """What is tokenised, and how.

    Attributes:
        sources: As `corpus.load_documents` takes them, in this order.
        tokenizer: As `load_tokenizer` takes it; `bpe-N` is trained on the sources.
        text_field: The field that holds the text in JSON, Parquet and hub data sets.
        shard_tokens: A shard ends with the first document that brings it to so many tokens.
    """

    sources: tuple[str, ...]
    tokenizer: str = "bytes"
    text_field: str = "text"
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        require_within("shard_tokens", self.shard_tokens, least=1, most=2**40)
        if not self.sources:
            raise ValueError("there is no source; name at least one")

    @property
    def is_trained(self) -> bool:
        """Whether the tokenizer is trained on the sources."""
        return self.tokenizer.startswith("bpe-")


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class Unfinished:
    """The state of a folder that is not finished.

    Attributes:
        files: Path, size and time of every file of every source.
        ends: For each shard, how far the sources were read: the source, its file, and documents of this file.
    """

    config: TokenizeConfig
    files: tuple[tuple[FileState, ...], ...]
    shards: tuple[Shard, ...] = ()
    ends: tuple[tuple[int, int, int], ...] = ()

    def add(self, shard: Shard, end: tuple[int, int, int]) -> "Unfinished":
        """The state with one more shard."""
        return replace(self, shards=(*self.shards, shard), ends=(*self.ends, end))

    def write(self, folder: Path) -> None:
        """Write it."""
        write_text(folder / UNFINISHED_NAME, json.dumps(asdict(self)))


_UNFINISHED = TypeAdapter(Unfinished)


def find_state(folder: Path, wanted: Unfinished) -> Unfinished:
    """What a folder that was claimed holds and can be kept of what is `wanted`; its other files are removed.

    Where files changed, the shards that were read before the first of them are kept; none if the tokenizer was trained
    on them.

    Raises:
        ValueError: if the folder holds something else, or shards of other settings.
    """
    path = folder / UNFINISHED_NAME
    if not path.exists():
        if any(not one.name.startswith((LOCK_NAME, PART)) for one in folder.iterdir()):
            raise ValueError(f"{folder} is not empty, and no token shards were begun there; choose another folder")
        return wanted
    found = parse(_UNFINISHED, read_bytes(path, _CURE), path, _CURE)
    require_same(folder, found.config, wanted.config)
    if found.files != wanted.files and found.config.is_trained:
        found = wanted
        shutil.rmtree(folder / TOKENIZER_NAME, ignore_errors=True)
    change, count = _first_change(found.files, wanted.files), 0
    for shard, end in zip(found.shards, found.ends, strict=True):
        if end > change or not _is_there(folder, shard):
            break
        count += 1
    kept = {name for shard in found.shards[:count] for name in (shard.name, table_path(folder / shard.name).name)}
    for part in folder.glob("part-*"):
        if part.name not in kept:
            part.unlink()
    return replace(wanted, shards=found.shards[:count], ends=found.ends[:count])


def config_of(index: TokenIndex) -> TokenizeConfig:
    """The settings that a finished folder was written with."""
    return TokenizeConfig(index.sources, index.tokenizer.name, index.text_field, index.shard_tokens)


def require_same(folder: Path, found: TokenizeConfig, wanted: TokenizeConfig) -> None:
    """Refuse to go on with other settings than a folder was begun with."""
    if difference := first_difference(json.loads(json.dumps(asdict(found))), asdict(wanted)):
        raise ValueError(f"{folder} was written with {difference}; choose another folder")


def _is_there(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    sizes = (2 * shard.tokens, 4 * shard.tokens)
    return path.is_file() and table_path(path).is_file() and path.stat().st_size in sizes


def _first_change(found: Sequence[Sequence[FileState]], wanted: Sequence[Sequence[FileState]]) -> tuple[int, int, int]:
    """The place before the first file that differs, or after all."""
    for number, (old, new) in enumerate(zip_longest(found, wanted, fillvalue=())):
        for at, (before, now) in enumerate(zip_longest(old, new)):
            if before != now:
                return number, at, 0
    return len(wanted), 0, 0
