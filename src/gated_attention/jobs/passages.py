"""Passages of one length for an inspection: half begin with a document, half inside of one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gated_attention.analysis import TextBatch

_CHARACTERS_PER_TOKEN = 16  # more than a token has on average, so that a cut text is long enough
_SEED = 0  # of the order in which documents are read, the same for every model


def cut_passages(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, num_tokens: int, batch_size: int
) -> list[TextBatch]:
    """About `num_tokens` tokens in passages of `length`, alternately from a document's start and from its middle.

    A document's start carries the special tokens that the tokenizer puts before a text, its middle none. Where a
    document ends early, EOS and the next document follow. No document is read twice; where they run out, the
    passages are fewer.

    Args:
        documents: Rows with `text`.
        tokenizer: The model's.
        length: Tokens per passage.
        num_tokens: Tokens in all; at least one passage is cut.
        batch_size: Passages per batch.

    Raises:
        ValueError: if there is not enough text for one passage.
    """
    wanted = max(1, num_tokens // length)
    texts = iter(documents[int(i)]["text"] for i in np.random.default_rng(_SEED).permutation(len(documents)))
    passages: list[list[int]] = []
    starts: list[bool] = []
    while len(passages) < wanted:
        at_start = len(passages) % 2 == 0
        passage = _passage(texts, tokenizer, length, at_start)
        if len(passage) < length:
            break
        passages.append(passage)
        starts.append(at_start)
    if not passages:
        raise ValueError(f"the text is too small: {len(passage)} tokens, a passage takes {length}; use less --context")
    ids, at_start_of = torch.tensor(passages), torch.tensor(starts)
    return [TextBatch(ids[i : i + batch_size], at_start_of[i : i + batch_size]) for i in range(0, len(ids), batch_size)]


def _passage(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int, at_start: bool) -> list[int]:
    """The next documents' tokens up to the length, fewer where there are no more."""
    ids: list[int] = []
    for text in texts:
        begin = 0 if at_start or ids else len(text) // 2
        piece = text[begin : begin + _CHARACTERS_PER_TOKEN * length]
        ids += _encode(tokenizer, piece, special_tokens=at_start or bool(ids))
        if ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= length:
            break
    return ids[:length]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> list[int]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # what looks like a special token in a text is text
        return list(backend.encode(text, add_special_tokens=special_tokens).ids)
    return list(tokenizer.encode(text, add_special_tokens=special_tokens, split_special_tokens=True, verbose=False))
