"""Loss of documents by domain: nats per token, perplexity and bits per byte, with standard errors over documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gated_attention.evaluate.loss import next_token_losses, perplexity
from gated_attention.nn.eval_mode import evaluating

Mode = Literal["start", "sliding"]
"""What is scored of a document: its first `context` tokens, or all of it in overlapping windows."""


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised document: its token ids, and the UTF-8 bytes that each stands for, 0 for special tokens."""

    ids: tuple[int, ...]
    num_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """The summed loss of a document's scored tokens, and the UTF-8 bytes that these stand for."""

    nats: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Loss over documents; all tokens have the same weight.

    Attributes:
        standard_error: Of `loss_nats`, over documents; None for a single one.
        bits_per_byte: Independent of the tokenizer, which lets models with different ones be compared.
    """

    loss_nats: float
    standard_error: float | None
    bits_per_byte: float
    num_documents: int
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return perplexity(self.loss_nats)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Losses by domain and their means, in which all domains have the same weight.

    Attributes:
        mean_perplexity: Mean of the domains' perplexities, which the paper prints (Table 1: "average over held-out
            English, Chinese, code, maths, law and literature").
        standard_error: Of `mean_loss_nats`; None where a domain has none.
    """

    domains: Mapping[str, DomainLoss]
    mean_perplexity: float
    mean_loss_nats: float
    mean_bits_per_byte: float
    standard_error: float | None


class Window(NamedTuple):
    """Tokens of one forward pass over a document, of which those from `first_scored` on count."""

    start: int
    stop: int
    first_scored: int


def windows(num_tokens: int, mode: Mode, context: int, stride: int) -> Iterator[Window]:
    """The passes over a document; every token but the first is scored at most once.

    Raises:
        ValueError: if the stride leaves tokens out.
    """
    if not 1 <= stride < context:
        raise ValueError(f"stride is {stride}; it must be at least 1 and below the context, {context}")
    scored, start = 1, 0
    while scored < num_tokens:
        stop = min(num_tokens, start + context)
        yield Window(start, stop, scored)
        if mode == "start":
            return
        scored, start = stop, start + stride


def document_losses(
    model: nn.Module, documents: Sequence[Document], *, mode: Mode, context: int, stride: int, batch_tokens: int = 8192
) -> list[DocumentLoss]:
    """The loss of each document, read alone.

    Args:
        mode: `start` scores the first `context` tokens. `sliding` scores all: windows of `context` tokens advance by
            `stride`, and each scores the tokens that the one before it did not reach, given at least
            `context - stride` tokens.
        context: Most tokens per pass.
        batch_tokens: Tokens per forward pass, padding included.
    """
    passes = [(i, window) for i, one in enumerate(documents) for window in windows(len(one.ids), mode, context, stride)]
    # The longest first, so that a batch that does not fit into memory fails at once.
    passes.sort(key=lambda one: one[1].start - one[1].stop)
    nats, num_tokens, num_bytes = [0.0] * len(documents), [0] * len(documents), [0] * len(documents)
    with evaluating(model) as device:
        begin = 0
        while begin < len(passes):
            width = passes[begin][1].stop - passes[begin][1].start
            batch = passes[begin : begin + max(1, batch_tokens // width)]
            begin += len(batch)
            rows = [torch.tensor(documents[i].ids[start:stop]) for i, (start, stop, _) in batch]
            ids = pad_sequence(rows, batch_first=True)  # on the right, where no token sees it
            losses = next_token_losses(model, ids.to(device)).double().cpu()
            for row, (i, (start, stop, scored)) in zip(losses, batch, strict=True):
                nats[i] += row[scored - start - 1 : stop - start - 1].sum().item()
                num_tokens[i] += stop - scored
                num_bytes[i] += sum(documents[i].num_bytes[scored:stop])
    return [DocumentLoss(*one) for one in zip(nats, num_tokens, num_bytes, strict=True)]


def domain_loss(losses: Sequence[DocumentLoss]) -> DomainLoss:
    """The loss over documents, with the standard error of a ratio of sums over m of them.

    That is `sqrt(m / (m - 1) * sum((nats_i - loss * tokens_i)^2)) / tokens`.

    Raises:
        ValueError: if no token was scored.
    """
    nats, counts = np.array([one.nats for one in losses]), np.array([one.num_tokens for one in losses])
    num_bytes, total, m = sum(one.num_bytes for one in losses), int(counts.sum()), len(losses)
    if not total or not num_bytes:
        raise ValueError("no document is long enough to score a token; give more text")
    loss = float(nats.sum() / total)
    spread = sqrt(m / (m - 1) * float(((nats - loss * counts) ** 2).sum())) / total if m > 1 else None
    return DomainLoss(loss, spread, float(nats.sum()) / log(2) / num_bytes, m, total, num_bytes)


def average_domains(losses: Sequence[DocumentLoss], domains: Sequence[str]) -> Perplexity:
    """Losses by domain, in alphabetical order, and their means; `domains` names each document's."""
    grouped: dict[str, list[DocumentLoss]] = {name: [] for name in sorted(set(domains))}
    for name, loss in zip(domains, losses, strict=True):
        grouped[name].append(loss)
    found = {name: domain_loss(group) for name, group in grouped.items()}
    every, k = list(found.values()), len(found)
    errors = [one.standard_error for one in every if one.standard_error is not None]
    return Perplexity(
        found,
        sum(one.perplexity for one in every) / k,
        sum(one.loss_nats for one in every) / k,
        sum(one.bits_per_byte for one in every) / k,
        sqrt(sum(error**2 for error in errors)) / k if len(errors) == k else None,
    )
