"""Passages of equal length for an inspection: half begin with a document, half within one."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gated_attention.analysis import TextBatch
from gated_attention.jobs.domain_text import CHARACTERS_PER_TOKEN, encode, reading_order


def cut_passages(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, num_tokens: int, batch_size: int
) -> list[TextBatch]:
    """About `num_tokens` tokens in passages of `length`, alternately from the start and from the middle of a document.

    A document's start has the special tokens that the tokenizer puts before a text, its middle none. Where a document
    ends early, EOS and the next document follow. No document is read twice; if they run out, there are fewer passages.

    Raises:
        ValueError: if there is not enough text for one passage.
    """
    texts = (documents[index]["text"] for index in reading_order(documents))
    passages: list[list[int]] = []
    for index in range(max(1, num_tokens // length)):
        passage = _passage(texts, tokenizer, length, at_start=index % 2 == 0)
        if len(passage) < length:
            break
        passages.append(passage)
    if not passages:
        raise ValueError(f"the text is too small: {len(passage)} tokens, a passage takes {length}; use less --context")
    at_start = torch.arange(len(passages)) % 2 == 0
    ids = torch.tensor(passages)
    return [TextBatch(ids[i : i + batch_size], at_start[i : i + batch_size]) for i in range(0, len(ids), batch_size)]


def _passage(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int, *, at_start: bool) -> list[int]:
    """The tokens of the next documents up to `length`; fewer if the documents run out."""
    ids: list[int] = []
    for text in texts:
        begin = 0 if at_start or ids else len(text) // 2
        piece = text[begin : begin + CHARACTERS_PER_TOKEN * length]
        ids += encode(tokenizer, piece, special_tokens=at_start if not ids else ids[-1] != tokenizer.bos_token_id)
        if ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= length:
            break
    return ids[:length]
