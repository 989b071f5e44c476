"""Text to fixed blocks of token ids: held-out split, packing, cache."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gated_attention.files import new_folder, waiting_for, writing_to
from gated_attention.ranges import require_choice, require_within
from gated_attention.train.text.blocks import Blocks, Ids, Packing, collate, evenly_spaced
from gated_attention.train.text.corpus import STDLIB, source_files
from gated_attention.train.text.split import Text, split_text
from gated_attention.train.text.tokenizer import (
    check_tokenizer_name,
    load_tokenizer,
    tokenizer_files,
    vocabulary_size,
)

__all__ = ["Blocks", "DataConfig", "PackedData", "collate", "load_data"]

_FORMAT = 3  # of the cached files; raised when the same settings would pack differently
_BATCH_BYTES = 2_000_000  # text per call of the tokenizer, which spreads it over all cores at about 75 bytes per token
_PIECE_CHARACTERS = 1_000_000  # longer documents are tokenised in pieces, cut at line ends
_CURVE_TOKENS = 32_768  # held-out text scored for each point of a validation curve

_ABOUT_NAME = "about.json"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which text a model reads, and how.

    Attributes:
        source: As `corpus.load_documents`.
        validation: A source of held-out text; None holds out documents of `source`.
        held_out: Share of the text that is held out when `validation` is None, as `split.split_text` cuts it.
        tokenizer: As `tokenizer.load_tokenizer`.
        block_size: Tokens per sequence.
        bos: Whether every sequence begins with the BOS token.
        packing: `stream` lets tokens see the documents before theirs in a block, `documents` keeps documents apart.
        max_validation_tokens: About how many held-out tokens are kept, evenly spaced blocks of all; None keeps all.
        seed: Of the document order and the choice of held-out documents.
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
        about: What the parts hold: documents and tokens of each, and how many of them `validation` keeps.
    """

    train: Blocks
    validation: Blocks
    tokenizer: PreTrainedTokenizerBase
    about: dict[str, int]

    @property
    def validation_sample(self) -> Blocks:
        """The part of the held-out text that the points of a validation curve are scored on."""
        return self.validation.sample(_CURVE_TOKENS)


def load_data(config: DataConfig, cache: Path, say: Callable[[str], None] = lambda message: None) -> PackedData:
    """The packed corpus, from the cache if it was packed before.

    Documents are shuffled, each is followed by EOS, and the stream is cut into blocks; a last, partial block is
    dropped. With `packing="documents"` that EOS opens the next document, which sees it and nothing before it; with
    `bos`, BOS does, and where it is another token than EOS it is put before every document. A training document whose
    text is also held out is left out. The cache is keyed by the settings and by path, size and time of every local
    file; a hub data set is known by its name alone.

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
    paths = [path for source in sources for path in source_files(source)] + tokenizer_files(config.tokenizer)
    parts = {
        "format": _FORMAT,
        "config": asdict(config),
        "files": [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths],
        "python": sys.version if STDLIB in sources else None,
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    say(f"reading {config.source}")
    train, validation = split_text(
        config.source, config.validation, held_out=config.held_out, text_field=config.text_field, seed=config.seed,
        say=say,
    )  # fmt: skip
    if config.tokenizer.startswith("bpe-"):
        say(f"training {config.tokenizer}")
    tokenizer = load_tokenizer(config.tokenizer, train.documents)
    if config.bos and tokenizer.bos_token_id is None:
        raise ValueError(f"tokenizer {config.tokenizer!r} has no BOS token; leave out --bos or choose another")
    tokenizer.save_pretrained(folder / "tokenizer")
    about: dict[str, int] = {}
    for name, text, limit in (("validation", validation, config.max_validation_tokens), ("train", train, None)):
        say(f"tokenising {text.num_bytes.sum() / 1e6:,.1f} MB for {name}")
        max_blocks = None if limit is None else max(1, limit // config.block_size)
        found = _write_blocks(folder / f"{name}.npy", text, tokenizer, config, max_blocks)
        about |= {f"{name}_{key}": value for key, value in found.items()}
    (folder / _ABOUT_NAME).write_text(json.dumps(about), encoding="utf-8")


def _write_blocks(
    path: Path, text: Text, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_blocks: int | None
) -> dict[str, int]:
    """Write the blocks, evenly spaced ones if all are too many, and count what there was and what was kept."""
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
            f"{source} is too small: {path.stem} has {num_ids} tokens, a block takes {width}; "
            "give more text or a smaller --context"
        )
    num_blocks = num_whole if max_blocks is None else min(max_blocks, num_whole)
    blocks = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_blocks, config.block_size))
    stream: Any = np.memmap(spool, dtype, mode="r", shape=(num_whole, width))
    kept = slice(None) if num_blocks == num_whole else evenly_spaced(num_whole, num_blocks)
    blocks[:, config.block_size - width :] = stream[kept]
    if config.bos:
        blocks[:, 0] = tokenizer.bos_token_id
    blocks.flush()
    num_documents = len(text.documents)
    counts = {"documents": num_documents, "tokens": num_ids, "kept_tokens": int(blocks.size)}
    if num_blocks < num_whole:
        num_documents = _count_documents(np.flatnonzero(stream == tokenizer.eos_token_id), kept, width)
    spool.unlink()
    return {**counts, "kept_documents": num_documents}


def _count_documents(ends: Any, blocks: Any, width: int) -> int:
    """How many documents have a token in these blocks, in order, of a stream in which they end at `ends`."""
    first, last = np.searchsorted(ends, blocks * width), np.searchsorted(ends, blocks * width + width - 1)
    return int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


def _tokenise(
    text: Text, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[np.generic], config: DataConfig
) -> Iterator[Ids]:
    """Token ids of the documents, EOS after each, some documents at a time."""
    encode = _encoder(tokenizer)
    end = [tokenizer.eos_token_id]
    if config.packing == "documents" and config.bos and tokenizer.bos_token_id != tokenizer.eos_token_id:
        end.append(tokenizer.bos_token_id)
    for batch in _batches(_pieces(text)):
        rows = encode([piece for piece, _ in batch])
        yield np.concatenate(
            [np.array(row + (end if is_end else []), dtype) for row, (_, is_end) in zip(rows, batch, strict=True)]
        )


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Text to ids as it stands: nothing added, nothing cut, and no special token read out of a document."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False) for text in texts
        ]
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda texts: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _pieces(text: Text) -> Iterator[tuple[str, bool]]:
    """Every document in pieces of bounded length, with whether it ends there."""
    batch = np.cumsum(text.num_bytes) // _BATCH_BYTES
    bounds = [*np.flatnonzero(np.diff(batch, prepend=-1)).tolist(), len(batch)]
    for start, stop in pairwise(bounds):
        for document in text.documents[start:stop]["text"]:
            at = 0
            while len(document) - at > _PIECE_CHARACTERS:
                cut = document.rfind("\n", at, at + _PIECE_CHARACTERS) + 1 or at + _PIECE_CHARACTERS
                yield document[at:cut], False
                at = cut
            yield document[at:], True


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece, is_end in pieces:
        batch.append((piece, is_end))
        size += len(piece)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
