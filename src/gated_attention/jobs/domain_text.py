"""Documents of each domain, tokenised one by one, with the number of bytes that each token covers."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

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
