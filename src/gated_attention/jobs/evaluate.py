"""`evaluate`: one model on the paper's benchmarks, under plain RoPE and the overrides that are asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.device import device_name
from gated_attention.evaluate.benchmarks import (
    BENCHMARKS,
    RULER,
    BenchmarkScore,
    check_benchmark,
    require_harness,
    run_benchmark,
)
from gated_attention.evaluate.length import Damage, LengthLoss, damage_inside, length_losses
from gated_attention.evaluate.perplexity import Document, Mode, Perplexity, average_domains, document_losses
from gated_attention.evaluate.quantization import Quantization, linear_layers, quantization_losses
from gated_attention.evaluate.retrieval import KINDS, RetrievalScore, Sample, make_samples, score_samples
from gated_attention.evaluate.rope import Rope, overridden, override_parameters
from gated_attention.jobs.analyze import BATCH_TOKENS, Say
from gated_attention.jobs.domain_text import encoder, read_domains, tokenise
from gated_attention.jobs.evaluation_plan import EvaluationPlan
from gated_attention.jobs.named_model import check_tokenizer, find_checkpoint, load_checkpoint, name_dtype
from gated_attention.jobs.passages import cut_passages
from gated_attention.nn.evaluating import evaluating
from gated_attention.train.text.corpus import load_documents

DEFAULT_CONTEXT = 4096
"""Tokens of context, if the model has as many positions."""

_OF_TEXT = {"perplexity", "length", "quantization"}
_FILLER_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class RopeEvaluation:
    """What was found under one rotary embedding.

    Attributes:
        damage: Loss against plain RoPE inside one context; None for plain RoPE itself.
    """

    rope: Rope
    perplexity: Perplexity | None = None
    length: tuple[LengthLoss, ...] = ()
    damage: Damage | None = None
    retrieval: tuple[RetrievalScore, ...] = ()
    benchmarks: tuple[BenchmarkScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was found, plain RoPE first.

    Attributes:
        is_complete: Whether every task is in it; if not, the evaluation goes on or was interrupted.
    """

    plan: EvaluationPlan
    label: str
    family: str
    num_parameters: int
    dtype: str
    device: str
    context: int
    ropes: tuple[RopeEvaluation, ...]
    quantization: Quantization | None
    is_complete: bool = False


Keep = Callable[[Evaluation], object]
"""Takes what has been found so far, after every task."""


def evaluate(
    plan: EvaluationPlan,
    device: torch.device,
    say: Say = lambda message: None,
    keep: Keep = lambda evaluation: None,
) -> Evaluation:
    """Run the tasks; all of them are checked, and their texts cut, before the first one runs.

    Raises:
        ValueError: if the model, the text or the tokenizer cannot be read or do not fit together, or a length is
            beyond the model's positions and neither YaRN nor a base is given.
    """
    if set(plan.tasks) & {*BENCHMARKS, RULER}:
        require_harness()
    checkpoint = find_checkpoint(plan.model)
    documents = None
    if _OF_TEXT & set(plan.tasks):
        say(f"reading {plan.source}")
        documents = _documents(plan)
    say(f"loading {checkpoint.name}")
    model, tokenizer = load_checkpoint(checkpoint, device, plan.tokenizer)
    _require_causal(model, checkpoint.name)
    run = _Run(plan, model, tokenizer, documents, device, say)
    run.check(checkpoint.name)
    found = Evaluation(
        plan=plan,
        label=checkpoint.label,
        family=model.config.model_type,
        num_parameters=model.num_parameters(),
        dtype=name_dtype(model),
        device=device_name(device),
        context=run.context,
        ropes=(),
        quantization=None,
    )
    for rope in plan.ropes():
        done = found.ropes
        with overridden(model, rope, run.positions or run.context):
            for one in run.under(rope, done[0] if done else None):
                found = replace(found, ropes=(*done, one))
                keep(found)
    if "quantization" in plan.tasks:
        found = replace(found, quantization=run.quantization())
    found = replace(found, is_complete=True)
    keep(found)
    return found


def _documents(plan: EvaluationPlan) -> Dataset:
    documents = load_documents(plan.source, plan.text_field, plan.domain_field)
    if plan.domain_field != "domain" and not any(documents["domain"]):
        raise ValueError(f"no document of {plan.source} has a field {plan.domain_field!r}; give another --field")
    return documents


def _require_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits depend on later tokens, as an encoder's do."""
    with evaluating(model) as device:
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    noise = 64 * torch.finfo(logits.dtype).eps * logits.float().abs().max()
    if (logits[0] - logits[1]).float().abs().max() > noise:
        raise ValueError(f"{name} ({model.config.model_type}) is not causal: it reads later tokens; give a decoder")


@dataclass(frozen=True)
class _Run:
    """A loaded model on its way through the tasks."""

    plan: EvaluationPlan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Dataset | None
    device: torch.device
    say: Say
    _cut: dict[int, torch.Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def positions(self) -> int | None:
        found = getattr(self.model.config, "max_position_embeddings", None)
        return int(found) if found else None

    @cached_property
    def context(self) -> int:
        return self.plan.context or min(DEFAULT_CONTEXT, self.positions or DEFAULT_CONTEXT)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return self.plan.lengths or (self.context,)

    @property
    def batch_tokens(self) -> int:
        return BATCH_TOKENS[self.device.type]

    def check(self, name: str) -> None:
        """Refuse lengths beyond the positions, overrides that cannot be, and a tokenizer of another model."""
        plan = self.plan
        for rope in plan.ropes()[1:]:
            override_parameters(self.model.config, rope, self.positions or self.context)
        longest = self.context
        if "length" in plan.tasks:
            longest = max(longest, max(plan.multiples) * self.context)
        if {"retrieval", RULER} & set(plan.tasks):
            longest = max(longest, *self.lengths)
        if self.positions and longest > self.positions and len(plan.ropes()) == 1:
            raise ValueError(
                f"{longest} tokens exceed the {self.positions} positions of {name}; "
                "give --yarn FACTOR or --rope-theta BASE, or shorter lengths"
            )
        sample = str(self.documents[0]["text"][:4096]) if self.documents is not None else "pass key 0123456789"
        check_tokenizer(self.model, max(tokenise(self.tokenizer, sample).ids, default=0), name)
        if "perplexity" in plan.tasks:
            _ = self.domains
        if "length" in plan.tasks:
            self._passages(max(plan.multiples) * self.context)
        if "quantization" in plan.tasks and len(self._passages(self.context)) < 2:
            raise ValueError("quantization needs two passages, one to calibrate; give more --tokens or less --context")
        if "quantization" in plan.tasks:
            linear_layers(self.model)
        if "retrieval" in plan.tasks:
            _ = self.samples
        for task in plan.tasks:
            if task in {*BENCHMARKS, RULER}:
                check_benchmark(self.tokenizer, task, local=plan.local, run_code=plan.run_code)

    def under(self, rope: Rope, plain: RopeEvaluation | None) -> Iterator[RopeEvaluation]:
        """What is found under one rotary embedding, which is in place already: more after every task."""
        tasks = self.plan.tasks
        found = RopeEvaluation(rope)
        if "perplexity" in tasks:
            found = replace(found, perplexity=self._perplexity(rope))
            yield found
        if "length" in tasks:
            length = self._length(rope)
            found = replace(found, length=length, damage=damage_inside(plain.length[0], length[0]) if plain else None)
            yield found
        if "retrieval" in tasks:
            found = replace(found, retrieval=self._retrieval(rope))
            yield found
        for task in tasks:
            if task in {*BENCHMARKS, RULER}:
                found = replace(found, benchmarks=(*found.benchmarks, *self._benchmark(task, rope)))
                yield found

    @cached_property
    def domains(self) -> tuple[list[Document], list[str]]:
        """Documents of each domain, for perplexity."""
        documents, domains = read_domains(
            cast(Dataset, self.documents), self.tokenizer, num_tokens=self.plan.num_tokens,
            mode=cast(Mode, self.plan.mode), context=self.context,
        )  # fmt: skip
        if not documents:
            raise ValueError(f"{self.plan.source} has no document of two tokens; give more text")
        check_tokenizer(self.model, max(max(document.ids) for document in documents), self.plan.model)
        return documents, domains

    @cached_property
    def samples(self) -> list[Sample]:
        """Retrieval's questions."""
        filler = read_filler(self.plan.filler)
        return [
            sample
            for kind in KINDS
            for length in self.lengths
            for sample in make_samples(
                kind, encoder(self.tokenizer), length=length, depths=self.plan.depths,
                num_samples=self.plan.num_samples, seed=self.plan.seed, filler=filler,
            )
        ]  # fmt: skip

    def _perplexity(self, rope: Rope) -> Perplexity:
        mode = cast(Mode, self.plan.mode)
        self.say(f"perplexity, {rope.label}")
        documents, domains = self.domains
        stride = self.plan.stride or max(1, self.context // 2)
        losses = document_losses(
            self.model, documents, mode=mode, context=self.context, stride=stride, batch_tokens=self.batch_tokens
        )
        return average_domains(losses, domains)

    def _passages(self, length: int) -> torch.Tensor:
        if length in self._cut:
            return self._cut[length]
        batches = cut_passages(
            cast(Dataset, self.documents), self.tokenizer, length=length, num_tokens=self.plan.num_tokens, batch_size=1
        )
        ids = torch.cat([batch.ids for batch in batches])
        check_tokenizer(self.model, int(ids.max()), self.plan.model)
        self._cut[length] = ids
        return ids

    def _length(self, rope: Rope) -> tuple[LengthLoss, ...]:
        self.say(f"length, {rope.label}")
        lengths = [multiple * self.context for multiple in sorted(set(self.plan.multiples))]
        passages = self._passages(lengths[-1])
        return tuple(length_losses(self.model, passages, self.context, lengths, self.batch_tokens))

    def _retrieval(self, rope: Rope) -> tuple[RetrievalScore, ...]:
        self.say(f"retrieval, {rope.label}")
        return tuple(score_samples(self.model, encoder(self.tokenizer), self.samples))

    def _benchmark(self, task: str, rope: Rope) -> list[BenchmarkScore]:
        self.say(f"{task}, {rope.label}")
        longest = max(self.lengths) if task == RULER else self.context
        return run_benchmark(
            self.model, self.tokenizer, task, context=longest, batch_size=max(1, self.batch_tokens // longest),
            shots=self.plan.shots, limit=self.plan.limit, local=self.plan.local, lengths=self.lengths,
            run_code=self.plan.run_code,
        )  # fmt: skip

    def quantization(self) -> Quantization:
        """Every fourth passage calibrates, the others are scored."""
        self.say("quantization")
        ids = self._passages(self.context)
        calibrating = torch.arange(len(ids)) % 4 == 1
        split = partial(torch.split, split_size_or_sections=max(1, self.batch_tokens // self.context))
        return quantization_losses(self.model, split(ids[~calibrating]), split(ids[calibrating]))


def read_filler(source: str | None) -> str:
    """The text that needles are hidden in; empty, which generates it, without a source."""
    if source is None:
        return ""
    text = ""
    for row in load_documents(source):
        text += row["text"] + "\n"
        if len(text) >= _FILLER_CHARACTERS:
            break
    return text
