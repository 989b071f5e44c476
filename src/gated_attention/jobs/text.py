"""Text as models read it: documents by domain with the bytes of each token, and passages of equal length."""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gated_attention.analysis import TextBatch
from gated_attention.analysis.encoders import PositionKind
from gated_attention.evaluate.perplexity import Document, Mode
from gated_attention.evaluate.retrieval import Encode
from gated_attention.train.text.tokenizer import text_core

UNNAMED = "all"
"""The domain of documents that name none."""

CHARACTERS_PER_TOKEN = 16
"""More than a token has on average, so that a text cut to this is long enough."""


def reading_order(documents: Dataset) -> list[int]:
    """A random order of the documents, the same for every model."""
    return list(np.random.default_rng(0).permutation(len(documents)).tolist())


def read_domains(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int, mode: Mode, context: int
) -> tuple[list[Document], list[str]]:
    """Documents and their domains, with about as many tokens of each domain; the last of a domain may be cut.

    Args:
        num_tokens: Tokens of all domains together.
        mode, context: As `evaluate.perplexity.document_losses`; mode `start` cuts documents to the context.
    """
    names = [name or UNNAMED for name in documents["domain"]]
    budget = dict.fromkeys(names, max(2, num_tokens // len(set(names))))
    found: list[Document] = []
    domains: list[str] = []
    for index in reading_order(documents):
        domain = names[index]
        left = budget[domain]
        if left < 2:
            continue
        longest = min(context, left) if mode == "start" else left
        document = tokenise(tokenizer, documents[index]["text"][: CHARACTERS_PER_TOKEN * longest])
        document = Document(document.ids[:longest], document.num_bytes[:longest])
        if len(document.ids) > 1:
            found.append(document)
            domains.append(domain)
            budget[domain] -= len(document.ids)
    return found, domains


def cut_passages(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_tokens: int,
    batch_size: int,
    wrapped: bool = False,
) -> list[TextBatch]:
    """About `num_tokens` tokens in passages of `length`, alternately from the start and from the middle of a document.

    A document's start has the special tokens that the tokenizer puts before a text, its middle none. Where a document
    ends early, EOS and the next document follow. No document is read twice; if they run out, there are fewer passages.

    Args:
        wrapped: Whether every passage begins and ends with the special tokens around a text, which encoders expect.

    Raises:
        ValueError: if there is not enough text for one passage.
    """
    texts = (documents[index]["text"] for index in reading_order(documents))
    passages: list[list[int]] = []
    before, after = special_around(tokenizer) if wrapped else ([], [])
    inner = length - len(before) - len(after)
    if inner < 1:
        raise ValueError(f"a passage of {length} tokens has no room between special tokens; use more --context")
    for index in range(max(1, num_tokens // length)):
        passage = _passage(texts, tokenizer, inner, at_start=index % 2 == 0, special_tokens=not wrapped)
        if len(passage) < inner:
            break
        passages.append([*before, *passage, *after])
    if not passages:
        raise ValueError(f"the text is too small: {len(passage)} tokens, a passage takes {length}; use less --context")
    at_start = torch.arange(len(passages)) % 2 == 0
    ids = torch.tensor(passages)
    kinds: list[PositionKind] = ["cls"] * len(before)
    kinds += ["content"] * inner
    kinds += ["sep"] * len(after)
    starts = range(0, len(ids), batch_size)
    return [TextBatch(ids[i : i + batch_size], at_start[i : i + batch_size], tuple(kinds)) for i in starts]


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    ids = list(tokenizer("a")["input_ids"])
    special = set(tokenizer.all_special_ids)
    content = [place for place, token in enumerate(ids) if token not in special]
    return ids[: content[0]], ids[content[-1] + 1 :]


def _passage(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int, *, at_start: bool, special_tokens: bool
) -> list[int]:
    """The tokens of the next documents up to `length`; fewer if the documents run out."""
    ids: list[int] = []
    for text in texts:
        begin = 0 if at_start or ids else len(text) // 2
        piece = text[begin : begin + CHARACTERS_PER_TOKEN * length]
        opens = at_start if not ids else ids[-1] != tokenizer.bos_token_id
        ids += encode(tokenizer, piece, special_tokens=opens and special_tokens)
        if ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= length:
            break
    return ids[:length]


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """A text after the special tokens that the tokenizer puts before one; those that it appends are left out."""
    core = text_core(tokenizer)
    if core is None:
        ids, special_ids = encode(tokenizer, text, special_tokens=True), set(tokenizer.all_special_ids)
        is_special = [token in special_ids for token in ids]
        num_bytes = [0 if token in special_ids else len(str(tokenizer.decode([token])).encode()) for token in ids]
    else:
        encoded = core.encode(text)
        ids, is_special = list(encoded.ids), list(encoded.special_tokens_mask)
        num_bytes, covered = [], 0
        for _, end in encoded.offsets:  # a character cut into several tokens counts for the first
            num_bytes.append(len(text[covered:end].encode()))
            covered = max(covered, end)
    last = len(ids)
    while last > 1 and is_special[last - 1]:
        last -= 1
    return Document(tuple(ids[:last]), tuple(num_bytes[:last]))


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Encodes texts as `tokenise` does, or without special tokens where they continue a sequence."""

    def encode_part(text: str, *, opens: bool = False) -> list[int]:
        return list(tokenise(tokenizer, text).ids) if opens else encode(tokenizer, text, special_tokens=False)

    return encode_part


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool) -> list[int]:
    """The ids of a whole text, with or without added special tokens; what looks like one in the text is text."""
    core = text_core(tokenizer)
    if core is not None:
        return list(core.encode(text, add_special_tokens=special_tokens).ids)
    return list(tokenizer.encode(text, add_special_tokens=special_tokens, split_special_tokens=True, verbose=False))
