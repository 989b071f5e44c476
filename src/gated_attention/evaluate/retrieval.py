"""Synthetic retrieval: a passkey, or a value by its key, hidden in filler text and asked for at the end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol, get_args

import torch
from torch import nn

from gated_attention.evaluate.loss import token_losses
from gated_attention.nn.evaluating import evaluating

Kind = Literal["passkey", "key-value"]
KINDS = get_args(Kind)

FILLER = (
    "The river runs past the mill. ", "Grain is weighed in the morning. ", "Two carts wait by the gate. ",
    "The road to town is dry. ", "Bread cools on the sill. ", "A boy counts the geese. ", "Smoke rises from the roof. ",
    "The clerk writes a letter. ", "Nobody asks about the weather. ", "The door is painted green. ",
)  # fmt: skip
"""Sentences that filler is generated from."""

_NUM_PAIRS = 4  # keys among which one is asked for
_DIGITS = 5


class Encode(Protocol):
    """Text to ids, whatever it looks like; with `opens` behind what the tokenizer puts before a text."""

    def __call__(self, text: str, *, opens: bool = False) -> list[int]:
        """The ids of a text that opens a sequence or goes on in one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One retrieval: text and where its answer begins.

    Attributes:
        prompt: Everything up to the answer.
        answer: What must follow.
        length: Tokens asked for.
        depth: Where the needle lies, 0 the beginning and 1 the end of the filler.
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
        loss_nats: Mean loss of the answers' tokens.
        exact_match: Share of answers whose every token is the model's first choice given those before it, which is
            what greedy decoding would write.
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
    """`num_samples` at each depth, prompt and answer together at most `length` tokens; the seed decides everything.

    Args:
        filler: Text to hide the needle in, beginning at a random place; empty generates sentences.

    Raises:
        ValueError: if the kind is unknown, a depth is no share, or the length holds no filler.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown retrieval {kind!r}; choose from {', '.join(KINDS)}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth is {depth:g}; it must be from 0 to 1")
        rng = Random(f"{seed}/{kind}/{length}/{depth:.6f}")
        for _ in range(num_samples):
            yield _sample(kind, encode, length, depth, rng, filler)


def _sample(kind: Kind, encode: Encode, length: int, depth: float, rng: Random, filler: str) -> Sample:
    needle, question, answer = _task(kind, rng)
    budget = length - len(encode(needle, opens=True)) - len(encode(question)) - len(encode(answer))
    text = _filler(filler, rng, 12 * max(0, budget))
    low, high = -1, len(text)  # characters of filler; the longest prompt that fits, by bisection
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
    sentences: list[str] = []
    size = 0
    while size < num_characters:
        sentences.append(rng.choice(FILLER))
        size += len(sentences[-1])
    return "".join(sentences)


def score_samples(model: nn.Module, encode: Encode, samples: Sequence[Sample]) -> list[RetrievalScore]:
    """Answers' losses and exact matches, averaged by kind, length and depth in the samples' order."""
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
    return [
        RetrievalScore(
            *place, sum(loss for loss, _ in scores) / len(scores), sum(x for _, x in scores) / len(scores), len(scores)
        )
        for place, scores in found.items()
    ]
