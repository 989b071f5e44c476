"""Synthetic retrieval: a pass key, or the value of a key, hidden in filler text and asked for at the end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol, get_args

import torch
from torch import nn

from gated_attention.evaluate.loss import token_losses
from gated_attention.nn.eval_mode import evaluating
from gated_attention.ranges import require_choice, require_within

Kind = Literal["passkey", "key-value"]
KINDS = get_args(Kind)

FILLER = (
    "The river runs past the mill. ", "Grain is weighed in the morning. ", "Two carts wait by the gate. ",
    "The road to town is dry. ", "Bread cools on the sill. ", "A boy counts the geese. ", "Smoke rises from the roof. ",
    "The clerk writes a letter. ", "Nobody asks about the weather. ", "The door is painted green. ",
)  # fmt: skip
"""Sentences that filler is generated from."""

_NUM_PAIRS = 4  # one of which is asked for
_DIGITS = 5


class Encode(Protocol):
    """Turns text into ids; what looks like a special token is text."""

    def __call__(self, text: str, *, opens: bool = False) -> list[int]:
        """The ids of a text; if it opens a sequence, after the special tokens that the tokenizer puts first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question.

    Attributes:
        prompt: Everything up to the answer.
        length: Tokens that prompt and answer were to fill.
        depth: Where the needle lies in the filler, from 0 (beginning) to 1 (end).
    """

    kind: Kind
    prompt: str
    answer: str
    length: int
    depth: float


@dataclass(frozen=True, slots=True)
class RetrievalScore:
    """Scores at one length and depth.

    Attributes:
        loss_nats: Mean over answers of the mean loss of their tokens.
        exact_match: Share of answers that greedy decoding would write.
    """

    kind: Kind
    length: int
    depth: float
    loss_nats: float
    exact_match: float
    num_samples: int


def make_samples(
    kind: Kind, encode: Encode, *, length: int, depths: Sequence[float], num_samples: int, seed: int, filler: str = ""
) -> Iterator[Sample]:
    """`num_samples` questions per depth; prompt and answer together take at most `length` tokens.

    Args:
        seed: Equal seeds give equal questions.
        filler: Text to hide the needle in, from a random place on; if empty, sentences are generated.

    Raises:
        ValueError: if the kind is unknown, a depth is not between 0 and 1, or the length leaves no room for filler.
    """
    require_choice("retrieval", kind, KINDS)
    for depth in depths:
        require_within("depth", depth, least=0, most=1)
        rng = Random(f"{seed}/{kind}/{length}/{depth:.6f}")
        for _ in range(num_samples):
            yield _sample(kind, encode, length, depth, rng, filler)


def _sample(kind: Kind, encode: Encode, length: int, depth: float, rng: Random, filler: str) -> Sample:
    needle, question, answer = _task(kind, rng)
    budget = length - len(encode(needle, opens=True)) - len(encode(question)) - len(encode(answer))
    text = _filler(filler, rng, 12 * max(0, budget))
    low, high = -1, len(text)  # bisection finds the most characters of filler that fit
    while high - low > 1:
        middle = (low + high) // 2
        prompt = _assemble(text[:middle], needle, question, depth)
        low, high = (middle, high) if len(encode(prompt, opens=True)) + len(encode(answer)) <= length else (low, middle)
    if low < 1:
        raise ValueError(f"a {kind} question leaves no room for filler in {length} tokens; use longer --lengths")
    return Sample(kind, _assemble(text[:low], needle, question, depth), answer, length, depth)


def _assemble(filler: str, needle: str, question: str, depth: float) -> str:
    cut = filler.rfind(" ", 0, round(depth * len(filler))) + 1 if depth < 1 else len(filler)
    return filler[:cut] + needle + filler[cut:] + question


def _task(kind: Kind, rng: Random) -> tuple[str, str, str]:
    if kind == "passkey":
        key = _digits(rng)
        return f"\nThe pass key is {key}. Remember it.\n", "\nThe pass key is", f" {key}"
    pairs: dict[str, str] = {}
    while len(pairs) < _NUM_PAIRS:
        pairs[_digits(rng)] = _digits(rng)
    key = rng.choice(sorted(pairs))
    listed = "; ".join(f"key {name} has value {value}" for name, value in pairs.items())
    return f"\n{listed}.\n", f"\nkey {key} has value", f" {pairs[key]}"


def _digits(rng: Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(_DIGITS))


def _filler(given: str, rng: Random, num_characters: int) -> str:
    if given:
        begin = rng.randrange(len(given))
        repeats = 2 + num_characters // len(given)
        return (given * repeats)[begin : begin + num_characters]
    text = ""
    while len(text) < num_characters:
        text += rng.choice(FILLER)
    return text


def score_samples(model: nn.Module, encode: Encode, samples: Sequence[Sample]) -> list[RetrievalScore]:
    """Losses and exact matches of the answers, averaged by kind, length and depth in the order of the samples."""
    found: dict[tuple[Kind, int, float], list[tuple[float, bool]]] = {}
    with evaluating(model) as device:
        for sample in samples:
            prompt, answer = encode(sample.prompt, opens=True), encode(sample.answer)
            ids = torch.tensor([prompt + answer], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
            targets = ids[:, len(prompt) :]
            loss = token_losses(logits, targets).double().mean().item()
            exact = bool((logits.argmax(-1) == targets).all())
            found.setdefault((sample.kind, sample.length, sample.depth), []).append((loss, exact))
    scores = []
    for place, answers in found.items():
        losses, matches = zip(*answers, strict=True)
        scores.append(RetrievalScore(*place, sum(losses) / len(losses), sum(matches) / len(losses), len(losses)))
    return scores
