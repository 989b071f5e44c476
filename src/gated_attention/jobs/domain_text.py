"""Documents of each domain, tokenised one by one with the bytes that every token stands for."""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gated_attention.evaluate.perplexity import Document, Mode
from gated_attention.evaluate.retrieval import Encode

UNNAMED = "all"
"""The domain of documents that name none."""

_CHARACTERS_PER_TOKEN = 16  # more than a token has on average, so that a cut text is long enough
_SEED = 0  # of the order in which documents are read, the same for every model


def read_domains(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int, mode: Mode, context: int
) -> tuple[list[Document], list[str]]:
    """Documents and their domains, about as many tokens of each domain; the last of a domain may be cut.

    Args:
        num_tokens: Tokens in all.
        mode, context: As `evaluate.perplexity.document_losses`; a document that is scored at its start is cut there.
    """
    names = [name or UNNAMED for name in documents["domain"]]
    budget = dict.fromkeys(sorted(set(names)), max(2, num_tokens // len(set(names))))
    found: list[Document] = []
    domains: list[str] = []
    for index in np.random.default_rng(_SEED).permutation(len(documents)).tolist():
        left = budget[names[index]]
        if left < 2:
            continue
        longest = min(context, left) if mode == "start" else left
        document = _cut(tokenise(tokenizer, documents[index]["text"][: _CHARACTERS_PER_TOKEN * longest]), longest)
        if len(document.ids) > 1:
            found.append(document)
            domains.append(names[index])
            budget[names[index]] -= len(document.ids)
    return found, domains


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """A text with the special tokens that the tokenizer puts before one; what looks like one in the text is text."""
    backend = _rust_core(tokenizer)
    if backend is None:
        ids = tokenizer.encode(text, split_special_tokens=True, verbose=False)
        special = set(tokenizer.all_special_ids)
        while len(ids) > 1 and ids[-1] in special:  # a document ends where its text does
            ids.pop()
        sizes = [0 if i in special else len(str(tokenizer.decode([i])).encode()) for i in ids]
        return Document(tuple(ids), tuple(sizes))
    encoded = backend.encode(text)
    sizes, covered = [], 0
    for _, end in encoded.offsets:  # a character cut into several tokens counts for the first
        sizes.append(len(text[covered:end].encode()))
        covered = max(covered, end)
    ids, last = list(encoded.ids), len(encoded.ids)
    while last > 1 and encoded.special_tokens_mask[last - 1]:  # a document ends where its text does
        last -= 1
    return Document(tuple(ids[:last]), tuple(sizes[:last]))


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Texts as `tokenise` reads them, or without the special tokens in front where they go on in a sequence."""

    def encode(text: str, *, opens: bool = False) -> list[int]:
        if opens:
            return list(tokenise(tokenizer, text).ids)
        backend = _rust_core(tokenizer)
        if backend is None:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            return list(tokenizer.encode(text, verbose=False, **plain))
        return list(backend.encode(text, add_special_tokens=False).ids)

    return encode


def _rust_core(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's core, told to take a text whole and as text; None if it has none."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
    return backend


def _cut(document: Document, length: int) -> Document:
    return Document(document.ids[:length], document.num_bytes[:length])
