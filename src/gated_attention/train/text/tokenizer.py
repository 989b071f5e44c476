"""Tokenizers: bytes, BPE trained on the corpus, or any that transformers can load."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gated_attention.train.checkpoints import last_checkpoint
from gated_attention.train.quiet import quiet
from gated_attention.train.text.corpus import one_line, require_hub

END_OF_TEXT = "<|endoftext|>"
"""Follows every document: the BOS and EOS token of our own tokenizers.

They have no padding token, because an embedding does not train the row of its padding index.
"""

BYTES = "bytes"
_BPE = re.compile(r"bpe-(\d+)")
_SMALLEST_BPE = 258  # 256 bytes, the end of text, and one merge
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "tekken*")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(
    name: str, documents: Dataset | None = None, max_train_bytes: int = 50_000_000
) -> PreTrainedTokenizerBase:
    """The tokenizer of that name.

    Args:
        name: `bytes` (257 tokens); `bpe-N`, byte-level BPE of N tokens trained on `documents`; a folder, also
            that of a run; or a hub name.
        documents: Training documents; only `bpe-N` reads them.
        max_train_bytes: How much text BPE is trained on: whole documents, drawn with a fixed seed.

    Raises:
        ValueError: if the name is unknown, N cannot be reached, or the tokenizer has no EOS token.
    """
    check_tokenizer_name(name)
    if name == BYTES:
        tokenizer = _byte_tokenizer()
    elif not (match := _BPE.fullmatch(name)):
        return _load(name)
    elif documents is None:
        raise ValueError(f"{name!r} is trained on text; pass documents, or name a tokenizer that exists")
    else:
        tokenizer = _train_bpe(int(match[1]), documents, max_train_bytes)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return cast(PreTrainedTokenizerBase, wrapped)


def open_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer put BOS before a text, as a model expects that read BOS at the start of every sequence.

    Raises:
        ValueError: if the tokenizer has no BOS token, or does not put it there.
    """
    bos = tokenizer.bos_token
    if bos is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no BOS token; leave out --bos or choose another")
    if opens_with_bos(tokenizer):
        return
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        tokenizer.add_bos_token = True
    else:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        before = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*before, template])
    if not opens_with_bos(tokenizer):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} puts no BOS before a text; leave out --bos or choose another"
        )


def opens_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by itself, as its model then expects."""
    return tokenizer.bos_token_id is not None and bool(tokenizer.encode("a")[0] == tokenizer.bos_token_id)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; `len` does not count gaps between ids."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum, equal for tokenizers that make the same ids of every text and end it with the same EOS.

    Which special tokens are put around a text does not count.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        encodes: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        whole = json.loads(core.to_str())
        encodes = {key: whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    content = json.dumps([encodes, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def check_tokenizer_name(name: str) -> None:
    """Refuse a `bpe-N` whose N is too small, before any text is read."""
    if (match := _BPE.fullmatch(name)) and int(match[1]) < _SMALLEST_BPE:
        raise ValueError(f"{name!r} is too small: bytes and the end of text take 257; use at least bpe-{_SMALLEST_BPE}")


def tokenizer_files(name: str) -> list[Path]:
    """The files of a tokenizer that is a local folder; none for any other tokenizer."""
    folder = None if name == BYTES or _BPE.fullmatch(name) else _folder(name)
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder else []


def text_core(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's Rust core, set to encode a whole text as text; None if it has none."""
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
    return core


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer; if not, transformers invents an empty one for some families."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _folder(name: str) -> Path | None:
    """The local folder of that name; for a run, such as `runs/NAME/VARIANT/seed0`, that of its last checkpoint."""
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        return None
    folder = Path(path)
    return folder if has_tokenizer(folder) else last_checkpoint(folder) or folder


def _load(name: str) -> PreTrainedTokenizerBase:
    folder, choices = _folder(name), "use 'bytes', 'bpe-N', a folder or a hub name"
    if folder is not None and not has_tokenizer(folder):
        raise ValueError(f"{name} holds no tokenizer; {choices}")
    if folder is None:
        if not HUB_NAME.fullmatch(name) or os.path.exists(os.path.expanduser(name)):
            raise ValueError(f"no tokenizer folder {name!r}; {choices}")
        require_hub(name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False)
    except Exception as error:  # the Rust core raises no narrower class for a broken tokenizer.json
        raise ValueError(f"no tokenizer {name!r} ({one_line(error)}); {choices}") from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # an encoder's, which ends a text
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token, which must follow every document; choose another")
    return cast(PreTrainedTokenizerBase, tokenizer)


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _train_bpe(vocab_size: int, documents: Dataset, max_train_bytes: int) -> Tokenizer:
    def sample() -> Iterator[str]:
        order = list(range(len(documents)))
        Random(0).shuffle(order)
        seen = 0
        for index in order:
            text = documents[index]["text"]
            yield text
            seen += len(text.encode())
            if seen >= max_train_bytes:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end of text comes last, as in the byte tokenizer
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    reached = tokenizer.get_vocab_size() + 1
    if reached < vocab_size:
        smaller = f"bpe-{reached}" if reached >= _SMALLEST_BPE else BYTES
        raise ValueError(f"the text yields only {reached} tokens of bpe-{vocab_size}; use {smaller} or more text")
    return tokenizer
