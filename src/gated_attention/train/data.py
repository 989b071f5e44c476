"""Text to fixed blocks of token ids: held-out split, packing, cache."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gated_attention.files import PART, is_held, waiting_for, writing_to
from gated_attention.ranges import require_within
from gated_attention.train.corpus import STDLIB, load_documents, source_files
from gated_attention.train.tokenizer import check_tokenizer_name, load_tokenizer, tokenizer_files

_FORMAT = 2  # of the cached files; raised when the same settings would pack differently
_BATCH_BYTES = 2_000_000  # text per call of the tokenizer, which spreads it over all cores at about 75 bytes a token
_PIECE_CHARACTERS = 1_000_000  # longer documents are tokenised in pieces, cut at line ends
_CURVE_TOKENS = 32_768  # held-out text scored for each point of a validation curve

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which text a model reads, and how.

    Attributes:
        source: As `corpus.load_documents`.
        validation: A source of held-out text; None holds out documents of `source`.
        held_out: Share of the text, by whole documents, that is held out when `validation` is None.
        tokenizer: As `tokenizer.load_tokenizer`.
        block_size: Tokens per sequence.
        bos: Whether every sequence begins with the BOS token.
        max_validation_tokens: Held-out blocks beyond this are left out, but for the first; None keeps all.
        seed: Of the document order and the choice of held-out documents.
    """

    source: str = STDLIB
    validation: str | None = None
    held_out: float = 0.05
    text_field: str = "text"
    tokenizer: str = "bytes"
    block_size: int = 256
    bos: bool = False
    max_validation_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_within("block_size", self.block_size, least=2, most=2**30)
        require_within("held_out", self.held_out, above=0, below=1)
        require_within("max_validation_tokens", self.max_validation_tokens, least=1)
        require_within("data seed", self.seed, least=0)
        check_tokenizer_name(self.tokenizer)


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of token ids, (num_blocks, block_size), mapped from a file.

    A flat array rather than an Arrow table: a batch of 64 x 1024 ids takes 0.3 ms to read and collate, not 8 ms.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.ids[index].astype(np.int64))}

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.ids.size)

    def sample(self, num_tokens: int) -> "Blocks":
        """Evenly spaced blocks, about `num_tokens` in all and at least one block: neighbours share a document."""
        num_blocks = min(len(self), max(1, num_tokens // self.ids.shape[1]))
        return Blocks(self.ids[:: len(self) // num_blocks][:num_blocks])

    def batches(self, batch_size: int) -> list[Tensor]:
        """All blocks in order, (B, T) each."""
        return [
            torch.from_numpy(self.ids[start : start + batch_size].astype(np.int64))
            for start in range(0, len(self), batch_size)
        ]


@dataclass(frozen=True, slots=True)
class PackedData:
    """A corpus ready for training."""

    train: Blocks
    validation: Blocks
    tokenizer: PreTrainedTokenizerBase

    @property
    def validation_sample(self) -> Blocks:
        """The part of the held-out text that the points of a validation curve are scored on."""
        return self.validation.sample(_CURVE_TOKENS)


def collate(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for a causal language model, which shifts the labels itself."""
    input_ids = torch.stack([block["input_ids"] for block in blocks])  # (B, T)
    return {"input_ids": input_ids, "labels": input_ids}


def load_data(config: DataConfig, cache: Path, say: Callable[[str], None] = lambda message: None) -> PackedData:
    """The packed corpus, from the cache if it was packed before.

    Documents are shuffled, each is followed by EOS, and the stream is cut into blocks; a last, partial
    block is dropped. A training document whose text is also held out is left out. The cache is keyed by the
    settings and by path, size and time of every local file; a hub data set is known by its name alone.

    Raises:
        ValueError: if the text cannot be read or is too small for one training and one validation block.
    """
    folder = cache / "packed" / _key(config)
    if not folder.exists():
        with writing_to(f"the cache {cache}", "free space or set XDG_CACHE_HOME"), waiting_for(_lock(folder), say):
            _remove_abandoned(folder.parent, but=folder.name)
            if not folder.exists():  # else whom this one waited for has packed it
                _pack_into(config, folder, say)
    return PackedData(
        train=Blocks(np.load(folder / "train.npy", mmap_mode="r")),
        validation=Blocks(np.load(folder / "validation.npy", mmap_mode="r")),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """Documents in the order they are read, and their sizes in bytes of UTF-8."""

    documents: datasets.Dataset
    num_bytes: npt.NDArray[np.int64]

    def select(self, rows: npt.NDArray[np.int64]) -> "_Text":
        return _Text(self.documents.select(rows), self.num_bytes[rows])


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


def _pack_into(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    part = folder.with_name(f"{PART}{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        _pack(config, part, say)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_abandoned(packed: Path, but: str) -> None:
    """Remove what killed processes left half-packed, by the lock that its packing held."""
    for part in packed.glob(f"{PART}*"):
        name = part.name.removeprefix(PART)
        if name != but and not is_held(_lock(packed / name)):
            shutil.rmtree(part, ignore_errors=True)


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    say(f"reading {config.source}")
    train, validation = _read(config, say)
    if config.tokenizer.startswith("bpe-"):
        say(f"training {config.tokenizer}")
    tokenizer = load_tokenizer(config.tokenizer, train.documents)
    if config.bos and tokenizer.bos_token_id is None:
        raise ValueError(f"tokenizer {config.tokenizer!r} has no BOS token; leave out --bos or choose another")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, text, limit in (("validation", validation, config.max_validation_tokens), ("train", train, None)):
        say(f"tokenising {text.num_bytes.sum() / 1e6:,.1f} MB for {name}")
        max_blocks = None if limit is None else max(1, limit // config.block_size)
        _write_blocks(folder / f"{name}.npy", text, tokenizer, config, max_blocks)


def _read(config: DataConfig, say: Callable[[str], None]) -> tuple[_Text, _Text]:
    """Training and held-out text, both shuffled, without a text in common."""
    source, column, order = _load(config.source, config)
    if config.validation is None:
        cut = _first_held_out(source.num_bytes[order], config.held_out)
        kept, held_out = order[:cut], order[cut:]
        other, other_column = source, column
    else:
        kept = order
        other, other_column, held_out = _load(config.validation, config)
    is_held_out = np.zeros(len(other_column), dtype=bool)
    is_held_out[held_out] = True
    held_out_text = other_column.filter(pa.array(is_held_out)).cast(column.type)
    is_copy = pc.is_in(column, value_set=held_out_text).to_numpy()[kept]
    if is_copy.all():
        raise ValueError(f"every document of {config.source} is held out as well; give other text for validation")
    if is_copy.any():
        say(f"leaving out {is_copy.sum():,} training documents that are held out as well")
    return source.select(kept[~is_copy]), other.select(held_out)


def _load(source: str, config: DataConfig) -> tuple[_Text, pa.ChunkedArray, npt.NDArray[np.int64]]:
    """The documents of a source as they lie, their text as an Arrow column, and a shuffled order of them."""
    documents = load_documents(source, config.text_field)
    column = documents.data.column("text")
    num_bytes = pc.binary_length(column).to_numpy().astype(np.int64)
    return _Text(documents, num_bytes), column, np.random.default_rng(config.seed).permutation(len(documents))


def _first_held_out(num_bytes: npt.NDArray[np.int64], share: float) -> int:
    """Where the held-out documents begin: as few as hold the share of the text, from the end, but not all."""
    if len(num_bytes) < 2:
        raise ValueError("the text is one document, and validation needs another; give --validation or more files")
    from_end = np.cumsum(num_bytes[::-1])
    num_held_out = int(np.searchsorted(from_end, share * num_bytes.sum())) + 1
    return max(1, len(num_bytes) - num_held_out)


def _write_blocks(
    path: Path, text: _Text, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_blocks: int | None
) -> None:
    width = config.block_size - int(config.bos)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    num_ids = 0
    spool = path.with_suffix(".ids")
    with spool.open("wb") as file:
        for ids in _tokenise(text, tokenizer, dtype):
            file.write(ids.data)
            num_ids += len(ids)
            if max_blocks is not None and num_ids >= max_blocks * width:
                break
    num_blocks = num_ids // width if max_blocks is None else min(max_blocks, num_ids // width)
    if not num_blocks:
        source = config.validation if config.validation is not None and path.stem == "validation" else config.source
        raise ValueError(
            f"{source} is too small: {path.stem} has {num_ids} tokens, a block takes {width}; "
            "give more text or a smaller --context"
        )
    blocks = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_blocks, config.block_size))
    blocks[:, config.block_size - width :] = np.memmap(spool, dtype, mode="r", shape=(num_blocks, width))
    if config.bos:
        blocks[:, 0] = tokenizer.bos_token_id
    blocks.flush()
    spool.unlink()


def _tokenise(text: _Text, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[np.generic]) -> Iterator[Ids]:
    """Token ids of the documents, EOS after each, some documents at a time."""
    encode = _encoder(tokenizer)
    for batch in _batches(_pieces(text)):
        rows = encode([piece for piece, _ in batch])
        ends = [[tokenizer.eos_token_id] if is_end else [] for _, is_end in batch]
        yield np.concatenate([np.array(row + end, dtype) for row, end in zip(rows, ends, strict=True)])


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


def _pieces(text: _Text) -> Iterator[tuple[str, bool]]:
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
