"""Loss of documents by domain: nats per token, perplexity and bits per byte, with the spread over documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log, sqrt
from typing import Literal

import numpy as np
import torch
from torch import nn

from gated_attention.evaluate.loss import next_token_losses, perplexity
from gated_attention.nn.evaluating import evaluating

Mode = Literal["start", "sliding"]
"""What of a document is scored: its first `context` tokens, or all of it in overlapping windows."""


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised document.

    Attributes:
        ids: Its tokens, special ones in front included.
        num_bytes: UTF-8 bytes that each token stands for, 0 for special tokens.
    """

    ids: tuple[int, ...]
    num_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """Summed loss of one document's scored tokens and the bytes these stand for."""

    nats: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Loss over documents, every token weighing the same.

    Attributes:
        standard_error: Of `loss_nats`, over documents; None for a single one.
        bits_per_byte: Free of the tokenizer, so that models with different ones compare.
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
    """Losses by domain and their averages, in which every domain weighs the same.

    Attributes:
        mean_perplexity: Mean of the domains' perplexities, what the paper prints (Table 1: "average over held-out
            English, Chinese, code, maths, law and literature").
        mean_loss_nats, mean_bits_per_byte: Means of the domains' losses.
        standard_error: Of `mean_loss_nats`; None where a domain has none.
    """

    domains: Mapping[str, DomainLoss]
    mean_perplexity: float
    mean_loss_nats: float
    mean_bits_per_byte: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens of one forward pass: `stop - start` of document `document`, of which those from `scored` on count."""

    document: int
    start: int
    stop: int
    scored: int


def windows(num_tokens: int, mode: Mode, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """`(start, stop, first scored)` of the passes over a document; every token but the first is scored at most once.

    Raises:
        ValueError: if the stride leaves tokens out.
    """
    if not 1 <= stride < context:
        raise ValueError(f"stride is {stride}; it must be at least 1 and below the context, {context}")
    scored, start = 1, 0
    while scored < num_tokens:
        stop = min(num_tokens, start + context)
        yield start, stop, scored
        if mode == "start":
            return
        scored, start = stop, start + stride


def document_losses(
    model: nn.Module, documents: Sequence[Document], *, mode: Mode, context: int, stride: int, batch_tokens: int = 8192
) -> list[DocumentLoss]:
    """The loss of each document, read alone.

    Args:
        mode: `start` scores the first `context` tokens. `sliding` scores all: windows of `context` tokens advance by
            `stride`, and each scores what the one before it has not, given at least `context - stride` tokens.
        context: Tokens per pass at the most.
        batch_tokens: Tokens per forward pass, padding included.
    """
    passes = [
        _Window(index, *window)
        for index, document in enumerate(documents)
        for window in windows(len(document.ids), mode, context, stride)
    ]
    nats, counts, num_bytes = np.zeros(len(documents)), np.zeros(len(documents), int), np.zeros(len(documents), int)
    with evaluating(model) as device:
        for batch in _batches(passes, batch_tokens):
            width = max(window.stop - window.start for window in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)  # padding on the right, which no token sees
            for row, window in zip(ids, batch, strict=True):
                row[: window.stop - window.start] = torch.tensor(
                    documents[window.document].ids[window.start : window.stop]
                )
            losses = next_token_losses(model, ids.to(device)).double().cpu()
            for row, window in zip(losses, batch, strict=True):
                begin, end = window.scored - window.start - 1, window.stop - window.start - 1
                nats[window.document] += row[begin:end].sum().item()
                counts[window.document] += end - begin
                num_bytes[window.document] += sum(documents[window.document].num_bytes[window.scored : window.stop])
    return [
        DocumentLoss(float(loss), int(count), int(size))
        for loss, count, size in zip(nats, counts, num_bytes, strict=True)
    ]


def _batches(passes: list[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Windows of similar length together, the longest first, so that too large a batch fails at once."""
    batch: list[_Window] = []
    for window in sorted(passes, key=lambda one: one.start - one.stop):
        width = (batch or [window])[0].stop - (batch or [window])[0].start
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def domain_loss(losses: Sequence[DocumentLoss]) -> DomainLoss:
    """Documents' losses as one.

    The standard error is that of a ratio of sums over m documents,
    `sqrt(m / (m - 1) * sum((nats_i - loss * tokens_i)^2)) / tokens`.

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
    """Losses by domain, in the domains' alphabetical order, and averaged over domains."""
    pairs = sorted(zip(domains, losses, strict=True), key=lambda pair: pair[0])
    found = {name: domain_loss([loss for _, loss in group]) for name, group in groupby(pairs, key=lambda pair: pair[0])}
    every, k = list(found.values()), len(found)
    errors = [one.standard_error for one in every]
    known = [error for error in errors if error is not None]
    return Perplexity(
        found,
        sum(one.perplexity for one in every) / k,
        sum(one.loss_nats for one in every) / k,
        sum(one.bits_per_byte for one in every) / k,
        sqrt(sum(error**2 for error in known)) / k if len(known) == k else None,
    )
