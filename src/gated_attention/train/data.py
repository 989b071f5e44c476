"""Text to fixed blocks of token ids: held-out split, packing, cache."""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gated_attention.train.corpus import STDLIB, load_documents, source_files
from gated_attention.train.tokenizer import check_tokenizer_name, load_tokenizer

_FORMAT = 1  # of the cached files; raised when the same settings would pack differently
_BATCH = 256  # documents per call of the tokenizer, which spreads them over all cores
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
        max_validation_tokens: Held-out text beyond this is left out; None keeps all.
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
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a sequence needs at least 2 tokens")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it is a share between 0 and 1")
        check_tokenizer_name(self.tokenizer)


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of token ids, (num_blocks, block_size), mapped from a file.

    A flat array rather than an Arrow table: reading a batch of 64 x 1024 ids takes a fraction of a millisecond.
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

    def first(self, num_tokens: int) -> "Blocks":
        """The first blocks, about `num_tokens` in all and at least one block."""
        return Blocks(self.ids[: max(1, num_tokens // self.ids.shape[1])])

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
        return self.validation.first(_CURVE_TOKENS)


def collate(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for a causal language model, which shifts the labels itself."""
    input_ids = torch.stack([block["input_ids"] for block in blocks])  # (B, T)
    return {"input_ids": input_ids, "labels": input_ids}


def load_data(config: DataConfig, cache: Path, say: Callable[[str], None] = lambda message: None) -> PackedData:
    """The packed corpus, from the cache if it was packed before.

    Documents are shuffled, each is followed by EOS, and the stream is cut into blocks; a last, partial
    block is dropped. The cache is keyed by the settings and by path, size and time of every local file; a
    hub data set is known by its name alone.

    Raises:
        ValueError: if the text cannot be read or is too small for one training and one validation block.
    """
    folder = cache / "packed" / _key(config)
    if not folder.exists():
        try:
            (cache / "packed").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the cache {cache} ({error.strerror}); set XDG_CACHE_HOME") from error
        part = Path(tempfile.mkdtemp(dir=cache / "packed", prefix=".part-"))
        try:
            _pack(config, part, say)
            if not folder.exists():  # another process may have been faster
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return PackedData(
        train=Blocks(np.load(folder / "train.npy", mmap_mode="r")),
        validation=Blocks(np.load(folder / "validation.npy", mmap_mode="r")),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )


def _key(config: DataConfig) -> str:
    names = [name for name in (config.source, config.validation, config.tokenizer) if name]
    paths = [path for name in names for path in source_files(name)]
    parts = {
        "format": _FORMAT,
        "config": asdict(config),
        "files": [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths],
        "python": sys.version if config.source == STDLIB else None,
        "tokenizers": tokenizers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    say(f"reading {config.source}")
    datasets.disable_progress_bars()
    documents = load_documents(config.source, config.text_field).shuffle(config.seed)
    if config.validation is None:
        documents, held_out = _split(documents, config.held_out)
    else:
        held_out = load_documents(config.validation, config.text_field).shuffle(config.seed)
    if config.tokenizer.startswith("bpe-"):
        say(f"training {config.tokenizer}")
    tokenizer = load_tokenizer(config.tokenizer, documents)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, part, limit in (("train", documents, None), ("validation", held_out, config.max_validation_tokens)):
        say(f"tokenising {len(part):,} documents for {name}")
        ids = _tokenise(part, tokenizer, limit)
        blocks = _cut(ids, config, tokenizer)
        if not len(blocks):
            raise ValueError(
                f"{config.source} is too small: {name} has {len(ids)} tokens, a block takes {config.block_size}; "
                "give more text or a smaller --context"
            )
        np.save(folder / f"{name}.npy", blocks)


def _split(documents: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Whole documents, from the end of the shuffled order, until they hold the share of the text."""
    if len(documents) < 2:
        raise ValueError("the text is one document, and validation needs another; give --validation or more files")
    sizes = np.array([len(text) for text in documents["text"]])
    from_end = np.cumsum(sizes[::-1])
    num_held_out = int(np.searchsorted(from_end, share * sizes.sum())) + 1
    cut = max(1, len(documents) - num_held_out)
    return documents.select(range(cut)), documents.select(range(cut, len(documents)))


def _tokenise(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Ids:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces, total = [], 0
    for batch in documents.iter(_BATCH):
        if backend is not None:
            rows = [row.ids for row in backend.encode_batch_fast(batch["text"], add_special_tokens=False)]
        else:
            rows = [tokenizer.encode(text, add_special_tokens=False) for text in batch["text"]]
        for row in rows:
            pieces.append(np.array([*row, tokenizer.eos_token_id], dtype=dtype))
            total += len(pieces[-1])
        if limit is not None and total >= limit:
            break
    return np.concatenate(pieces)[:limit]


def _cut(ids: Ids, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Ids:
    width = config.block_size - int(config.bos)
    blocks = ids[: len(ids) // width * width].reshape(-1, width)
    if not config.bos:
        return blocks
    if tokenizer.bos_token_id is None:
        raise ValueError(f"tokenizer {config.tokenizer!r} has no BOS token; leave out --bos or choose another")
    starts = np.full((len(blocks), 1), tokenizer.bos_token_id, dtype=blocks.dtype)
    return np.concatenate((starts, blocks), axis=1)
