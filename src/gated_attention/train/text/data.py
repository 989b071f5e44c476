"""From text to fixed blocks of token ids: held-out split, packing, cache."""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import tokenizers
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gated_attention.files import new_folder, waiting_for, writing_to
from gated_attention.ranges import require_choice, require_within
from gated_attention.shards.index import INDEX_NAME
from gated_attention.shards.mixture import find_shards
from gated_attention.shards.unfinished import TokenizeConfig
from gated_attention.train.text.blocks import Blocks, Ids, Packing, collate, evenly_spaced
from gated_attention.train.text.corpus import STDLIB, file_state, source_files
from gated_attention.train.text.pieces import batches, encoder, pieces
from gated_attention.train.text.split import Text, split_text
from gated_attention.train.text.token_documents import TokenDocuments, mixed_documents, require_tokenizer
from gated_attention.train.text.tokenize import tokenize
from gated_attention.train.text.tokenizer import (
    check_tokenizer_name,
    load_tokenizer,
    open_with_bos,
    tokenizer_files,
    vocabulary_size,
)

__all__ = ["Blocks", "DataConfig", "PackedData", "collate", "load_data"]

_FORMAT = 5  # of the cached files; increases when the same settings would be packed differently
_READ_DOCUMENTS = 100  # read from the data set at a time
_CURVE_TOKENS = 32_768  # held-out text scored for each point of a validation curve
_ABOUT_NAME = "about.json"
_TOKENS_NAME = "tokens"  # of text beside shards, while it is packed


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which text a model reads, and how.

    Attributes:
        source: As in `corpus.load_documents`, or token shards as in `mixture.find_shards`.
        validation: A source of held-out text, likewise; None holds out documents of `source`.
        held_out: Share of the text that is held out when `validation` is None; see `split.split_text`.
        tokenizer: As in `tokenizer.load_tokenizer`.
        block_size: Tokens per sequence.
        bos: Whether every sequence begins with the BOS token.
        packing: `stream` lets tokens see earlier documents in their block, `documents` keeps documents apart.
        max_validation_tokens: About how many held-out tokens to keep, in evenly spaced blocks; None keeps all.
        seed: Determines the order of documents and which are held out.
    """

    source: str = STDLIB
    validation: str | None = None
    held_out: float = 0.05
    text_field: str = "text"
    tokenizer: str = "bytes"
    block_size: int = 256
    bos: bool = False
    packing: Packing = "stream"
    max_validation_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_within("block_size", self.block_size, least=2, most=2**30)
        require_within("held_out", self.held_out, above=0, below=1)
        require_within("max_validation_tokens", self.max_validation_tokens, least=1)
        require_within("data seed", self.seed, least=0)
        require_choice("packing", self.packing, get_args(Packing))
        check_tokenizer_name(self.tokenizer)


@dataclass(frozen=True, slots=True)
class PackedData:
    """A corpus ready for training.

    Attributes:
        about: Documents and tokens of each part, how many of them are kept, and a digest of all kept ids.
    """

    train: Blocks
    validation: Blocks
    tokenizer: PreTrainedTokenizerBase
    about: dict[str, int]
    kind: ClassVar = "text"

    @property
    def validation_sample(self) -> Blocks:
        """The part of the held-out text that each point of a validation curve is scored on."""
        return self.validation.sample(_CURVE_TOKENS)


def load_data(config: DataConfig, cache: Path, say: Callable[[str], None] = lambda message: None) -> PackedData:
    """The packed corpus, from the cache if it was packed before.

    Documents are shuffled, each is followed by EOS, and the stream is cut into blocks; a partial last block is
    dropped. With `packing="documents"`, that EOS opens the next document, which sees nothing before it. With `bos` too,
    BOS opens documents; where it differs from EOS, it is inserted before each. Training documents whose text is also
    held out are left out. The cache is keyed by the settings and by path, size and time of every local file; a hub data
    set is identified by its name alone.

    Raises:
        ValueError: if the text cannot be read or is too small for one training and one validation block.
    """
    folder = cache / "packed" / _key(config)
    if not folder.exists():
        lock = folder.with_name(f".{folder.name}.lock")
        with writing_to(f"the cache {cache}", "free space or set XDG_CACHE_HOME"), waiting_for(lock, say):
            if not folder.exists():  # otherwise another process packed it during the wait
                with new_folder(folder) as part:
                    _pack(config, part, say)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    opener = None
    if config.packing == "documents":
        opener = tokenizer.bos_token_id if config.bos else tokenizer.eos_token_id
    return PackedData(
        train=Blocks(np.load(folder / "train.npy", mmap_mode="r"), opener),
        validation=Blocks(np.load(folder / "validation.npy", mmap_mode="r"), opener),
        tokenizer=tokenizer,
        about=json.loads((folder / _ABOUT_NAME).read_text(encoding="utf-8")),
    )


def _key(config: DataConfig) -> str:
    sources = [config.source, *([config.validation] if config.validation is not None else [])]
    paths = [path for source in sources for path in _files(source)] + tokenizer_files(config.tokenizer)
    parts = {
        "format": _FORMAT,
        "config": asdict(config),
        "files": [file_state(path) for path in paths],
        "python": sys.version if STDLIB in sources else None,
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _files(source: str) -> list[Path]:
    if mixture := find_shards(source):
        return [path for shards, _ in mixture for path in (shards.folder / INDEX_NAME, *shards.paths)]
    return source_files(source)


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    say(f"reading {config.source}")
    named = [source for source in (config.source, config.validation) if source is not None]
    in_shards = [shards for source in named for shards, _ in find_shards(source)]
    for shards in in_shards:
        require_tokenizer(shards, config.tokenizer)
    name = str(in_shards[0].tokenizer) if in_shards else config.tokenizer

    def read_tokens(source: str) -> TokenDocuments:
        mixture = find_shards(source)
        for shards, _ in mixture:
            say(f"checking {shards.folder}")
            shards.verify()
        if not mixture:
            say(f"tokenising {source}")
            made = tokenize(TokenizeConfig((source,), name, config.text_field), folder / _TOKENS_NAME, say=say)
            mixture = [(made, 1.0)]
        return mixed_documents(mixture, config.seed)

    train, validation = split_text(
        config.source, config.validation, config.held_out, config.text_field, config.seed, say,
        read_tokens if in_shards else None,
    )  # fmt: skip
    if not in_shards and config.tokenizer.startswith("bpe-"):
        say(f"training {config.tokenizer}")
    tokenizer = load_tokenizer(name, None if in_shards else train.documents)
    if config.bos:
        open_with_bos(tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    about: dict[str, int] = {}
    for part, text, limit in (("validation", validation, config.max_validation_tokens), ("train", train, None)):
        say(f"{'packing' if in_shards else 'tokenising'} {text.num_bytes / 1e6:,.1f} MB for {part}")
        max_blocks = None if limit is None else max(1, limit // config.block_size)
        found = _write_blocks(folder / f"{part}.npy", text, tokenizer, config, max_blocks)
        about |= {f"{part}_{key}": value for key, value in found.items()}
    shutil.rmtree(folder / _TOKENS_NAME, ignore_errors=True)
    about["digest"] = _digest(folder / f"{part}.npy" for part in ("validation", "train"))
    (folder / _ABOUT_NAME).write_text(json.dumps(about), encoding="utf-8")


def _digest(paths: Iterable[Path]) -> int:
    """48 bits of the SHA-256 of files: a whole number, since records hold such about their text."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return int.from_bytes(whole.digest()[:6])


def _write_blocks(
    path: Path, text: Text, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_blocks: int | None
) -> dict[str, int]:
    """Write at most `max_blocks` evenly spaced blocks; returns the numbers of documents and tokens, all and kept."""
    width = config.block_size - int(config.bos)
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32)
    num_ids = 0
    spool = path.with_suffix(".ids")
    with spool.open("wb") as file:
        for ids in _tokenise(text, tokenizer, dtype, config):
            file.write(ids.data)
            num_ids += len(ids)
    num_whole = num_ids // width
    if not num_whole:
        source = config.validation if config.validation is not None and path.stem == "validation" else config.source
        raise ValueError(
            f"{source} is too small: {path.stem} has {num_ids} tokens and a block takes {width}; "
            "give more text or a smaller --context"
        )
    num_blocks = num_whole if max_blocks is None else min(max_blocks, num_whole)
    blocks = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_blocks, config.block_size))
    stream: Any = np.memmap(spool, dtype, mode="r", shape=(num_whole, width))
    kept: Any = slice(None) if num_blocks == num_whole else evenly_spaced(num_whole, num_blocks)
    blocks[:, config.block_size - width :] = stream[kept]
    if config.bos:
        blocks[:, 0] = tokenizer.bos_token_id
    blocks.flush()
    num_documents = kept_documents = len(text.documents)
    if num_blocks < num_whole:  # count the documents that have a token in a kept block
        ends = np.flatnonzero(stream == tokenizer.eos_token_id)
        first, last = np.searchsorted(ends, kept * width), np.searchsorted(ends, kept * width + width - 1)
        kept_documents = int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())
    spool.unlink()
    return {
        "documents": num_documents,
        "tokens": num_ids,
        "kept_tokens": int(blocks.size),
        "kept_documents": kept_documents,
    }


def _tokenise(
    text: Text, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[np.generic], config: DataConfig
) -> Iterator[Ids]:
    """Token ids of the documents in batches, EOS after each document."""
    inserted = None
    if config.packing == "documents" and config.bos and tokenizer.bos_token_id != tokenizer.eos_token_id:
        inserted = tokenizer.bos_token_id
    if isinstance(text.documents, TokenDocuments):
        yield from text.documents.batches(dtype, inserted)
        return
    encode = encoder(tokenizer)
    end = [tokenizer.eos_token_id, *([] if inserted is None else [inserted])]
    for batch in batches(_pieces(text.documents)):
        rows = encode([piece.text for piece in batch])
        yield np.concatenate(
            [np.array(row + (end if piece.is_end else []), dtype) for row, piece in zip(rows, batch, strict=True)]
        )


class _Piece(NamedTuple):
    text: str
    is_end: bool


def _pieces(documents: Dataset) -> Iterator[_Piece]:
    """Every document in pieces of bounded length, each with whether the document ends there."""
    for rows in documents.select_columns("text").iter(batch_size=_READ_DOCUMENTS):
        for document in rows["text"]:
            yield from (_Piece(*piece) for piece in pieces(io.StringIO(document)))
