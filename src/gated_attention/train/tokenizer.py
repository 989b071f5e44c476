"""Tokenizers: bytes, BPE trained on the corpus, or any that transformers can load."""

import re
from collections.abc import Iterator
from random import Random
from typing import cast

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""Follows every document; BOS and EOS of our own tokenizers.

They have no padding token: an embedding never trains the row of its padding index.
"""

BYTES = "bytes"
_BPE = re.compile(r"bpe-(\d+)")
_SMALLEST_BPE = 258  # 256 bytes, the end of text, and one merge


def load_tokenizer(name: str, documents: Dataset, max_train_bytes: int = 50_000_000) -> PreTrainedTokenizerBase:
    """The tokenizer of that name.

    Args:
        name: `bytes` (257 tokens); `bpe-N`, byte-level BPE of N tokens trained on `documents`; a folder or hub name.
        documents: Training documents; only `bpe-N` reads them.
        max_train_bytes: How much text BPE is trained on, whole documents drawn from all of them with a fixed seed.

    Raises:
        ValueError: if the name is unknown, N cannot be reached, or the tokenizer has no EOS token.
    """
    if name == BYTES:
        return _wrap(_byte_tokenizer())
    if match := _BPE.fullmatch(name):
        return _wrap(_train_bpe(int(match[1]), documents, max_train_bytes))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"no tokenizer {name!r} ({cause}); use 'bytes', 'bpe-N', a folder or a hub name") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token, which must follow every document; choose another")
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_tokenizer_name(name: str) -> None:
    """Refuse a BPE size that cannot be, before any text is read.

    Raises:
        ValueError: if N of `bpe-N` is too small.
    """
    if (match := _BPE.fullmatch(name)) and int(match[1]) < _SMALLEST_BPE:
        raise ValueError(f"{name!r} is too small: bytes and the end of text take 257; use at least bpe-{_SMALLEST_BPE}")


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(vocab_size: int, documents: Dataset, max_train_bytes: int) -> Tokenizer:
    check_tokenizer_name(f"bpe-{vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end of text comes last, as with bytes
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, max_train_bytes), trainer)
    reached = tokenizer.get_vocab_size() + 1
    if reached < vocab_size:
        raise ValueError(f"the text yields only {reached} tokens of bpe-{vocab_size}; use bpe-{reached} or more text")
    return tokenizer


def _sample(documents: Dataset, max_bytes: int) -> Iterator[str]:
    order = list(range(len(documents)))
    Random(0).shuffle(order)
    seen = 0
    for index in order:
        text = documents[index]["text"]
        yield text
        seen += len(text.encode())
        if seen >= max_bytes:
            return


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return cast(
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        ),
    )
