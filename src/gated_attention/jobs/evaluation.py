"""`evaluate`: one model on the paper's benchmarks, under plain RoPE and the overrides that are asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from gated_attention.evaluate.perplexity import Perplexity, average_domains, document_losses, windows
from gated_attention.evaluate.quantization import Quantization, linear_layers, quantization_losses
from gated_attention.evaluate.retrieval import RetrievalScore, score_samples
from gated_attention.evaluate.rope import Rope, overridden, override_parameters
from gated_attention.jobs.analyze import BATCH_TOKENS, Say
from gated_attention.jobs.evaluation_plan import EvaluationPlan
from gated_attention.jobs.named_model import (
    check_tokenizer,
    find_checkpoint,
    load_checkpoint,
    name_dtype,
    num_positions,
    require_causal,
)
from gated_attention.jobs.retrieval_data import all_samples
from gated_attention.jobs.text import cut_passages, encoder, read_domains, tokenise
from gated_attention.train.text.corpus import load_documents

DEFAULT_CONTEXT = 4096
"""Tokens of context, if the model has as many positions."""

_TEXT_TASKS = {"perplexity", "length", "quantization"}


@dataclass(frozen=True, slots=True)
class RopeEvaluation:
    """The results under one rotary embedding.

    Attributes:
        damage: Loss relative to plain RoPE within one context; None for plain RoPE itself.
    """

    rope: Rope
    perplexity: Perplexity | None = None
    length: tuple[LengthLoss, ...] = ()
    damage: Damage | None = None
    retrieval: tuple[RetrievalScore, ...] = ()
    benchmarks: tuple[BenchmarkScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of all tasks, plain RoPE first.

    Attributes:
        is_complete: Whether every task is included; if not, the evaluation is running or was interrupted.
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
"""Takes the results so far, after every task."""


def evaluate(
    plan: EvaluationPlan,
    device: torch.device,
    say: Say = lambda message: None,
    keep: Keep = lambda evaluation: None,
) -> Evaluation:
    """Run the tasks; all of them are checked, and their texts cut, before the first one runs.

    Raises:
        ValueError: if the model, the text or the tokenizer cannot be read or do not fit together, or a length exceeds
            the model's positions and neither YaRN nor a base is given.
    """
    if BENCHMARKS.keys() & set(plan.tasks):
        require_harness()
    checkpoint = find_checkpoint(plan.model)
    documents = None
    if _TEXT_TASKS & set(plan.tasks):
        say(f"reading {plan.source}")
        documents = load_documents(plan.source, plan.text_field, plan.domain_field)
        if plan.domain_field != "domain" and not any(documents["domain"]):
            raise ValueError(f"no document of {plan.source} has a field {plan.domain_field!r}; give another --field")
    say(f"loading {checkpoint.name}")
    model, tokenizer = load_checkpoint(checkpoint, device, plan.tokenizer)
    require_causal(model, checkpoint.name)
    run = _Run(plan, model, tokenizer, documents, BATCH_TOKENS[device.type])
    run.check(checkpoint.name)
    of_rope: list[str] = [task for task in ("perplexity", "length", "retrieval") if task in plan.tasks]
    of_rope += [task for task in plan.tasks if task in BENCHMARKS]
    measures = {task: run.prepare(task) for task in of_rope}
    quantize = run.quantization() if "quantization" in plan.tasks else None
    found = Evaluation(
        plan, checkpoint.label, family=model.config.model_type, num_parameters=model.num_parameters(),
        dtype=name_dtype(model), device=device_name(device), context=run.context, ropes=(), quantization=None,
    )  # fmt: skip
    for rope in plan.ropes():
        done, one = found.ropes, RopeEvaluation(rope)
        with overridden(model, rope, run.positions or run.context):
            for task, measure in measures.items():
                say(f"{task}, {rope.label}")
                one = measure(one, done[0] if done else None)
                found = replace(found, ropes=(*done, one))
                keep(found)
    if quantize is not None:
        say("quantization")
        found = replace(found, quantization=quantize())
    found = replace(found, is_complete=True)
    keep(found)
    return found


_Measure = Callable[[RopeEvaluation, RopeEvaluation | None], RopeEvaluation]
"""Adds a task's results under the rotary embedding in place; the second argument is plain RoPE's, None for itself."""


@dataclass(frozen=True)
class _Run:
    """A loaded model whose tasks are prepared, each checked and its text cut, before the first one is measured."""

    plan: EvaluationPlan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Dataset | None
    batch_tokens: int

    @cached_property
    def positions(self) -> int | None:
        return num_positions(self.model)

    @cached_property
    def context(self) -> int:
        return self.plan.context or min(DEFAULT_CONTEXT, self.positions or DEFAULT_CONTEXT)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return self.plan.lengths or (self.context,)

    def check(self, name: str) -> None:
        """Refuse lengths beyond the positions, impossible overrides, and a tokenizer of another model."""
        plan = self.plan
        tasks = set(plan.tasks)
        for rope in plan.ropes()[1:]:
            override_parameters(self.model.config, rope, self.positions or self.context)
        longest = max(
            self.context,
            max(plan.multiples) * self.context if "length" in tasks else 0,
            max(self.lengths) if {"retrieval", RULER} & tasks else 0,
        )
        if self.positions and longest > self.positions and len(plan.ropes()) == 1:
            raise ValueError(
                f"{longest} tokens exceed the {self.positions} positions of {name}; "
                "give --yarn FACTOR or --rope-theta BASE, or shorter lengths"
            )
        if plan.stride is not None:
            next(windows(2, plan.mode, self.context, plan.stride))  # refuses a stride that leaves tokens out
        sample = str(self.documents[0]["text"][:4096]) if self.documents is not None else "pass key 0123456789"
        check_tokenizer(self.model, max(tokenise(self.tokenizer, sample).ids, default=0), name)

    def prepare(self, task: str) -> _Measure:
        """The measure of any task but quantization.

        Raises:
            ValueError: if the task cannot run.
        """
        own = {"perplexity": self._perplexity, "length": self._length, "retrieval": self._retrieval}
        return own[task]() if task in own else self._benchmark(task)

    def _perplexity(self) -> _Measure:
        plan, context = self.plan, self.context
        documents, domains = read_domains(
            cast(Dataset, self.documents), self.tokenizer, num_tokens=plan.num_tokens, mode=plan.mode, context=context
        )
        if not documents:
            raise ValueError(f"{plan.source} has no document of two tokens; give more text")
        check_tokenizer(self.model, max(max(document.ids) for document in documents), plan.model)

        def measure(found: RopeEvaluation, _: RopeEvaluation | None) -> RopeEvaluation:
            stride, most = plan.stride or max(1, context // 2), self.batch_tokens
            losses = document_losses(
                self.model, documents, mode=plan.mode, context=context, stride=stride, batch_tokens=most
            )
            return replace(found, perplexity=average_domains(losses, domains))

        return measure

    def _length(self) -> _Measure:
        lengths = [multiple * self.context for multiple in sorted(self.plan.multiples)]
        passages = self._cut(lengths[-1])

        def measure(found: RopeEvaluation, plain: RopeEvaluation | None) -> RopeEvaluation:
            losses = tuple(length_losses(self.model, passages, self.context, lengths, self.batch_tokens))
            damage = damage_inside(plain.length[0], losses[0]) if plain else None
            return replace(found, length=losses, damage=damage)

        return measure

    def _retrieval(self) -> _Measure:
        plan, encode = self.plan, encoder(self.tokenizer)
        samples = all_samples(
            encode, lengths=self.lengths, depths=plan.depths, num_samples=plan.num_samples, seed=plan.seed,
            filler=plan.filler,
        )  # fmt: skip
        return lambda found, _: replace(found, retrieval=tuple(score_samples(self.model, encode, samples)))

    def _benchmark(self, task: str) -> _Measure:
        plan = self.plan
        check_benchmark(self.tokenizer, task, local=plan.local, run_code=plan.run_code)
        longest = max(self.lengths) if task == RULER else self.context

        def measure(found: RopeEvaluation, _: RopeEvaluation | None) -> RopeEvaluation:
            scores = run_benchmark(
                self.model, self.tokenizer, task, context=longest, batch_size=max(1, self.batch_tokens // longest),
                shots=plan.shots, limit=plan.limit, local=plan.local, lengths=self.lengths, run_code=plan.run_code,
            )  # fmt: skip
            return replace(found, benchmarks=(*found.benchmarks, *scores))

        return measure

    def quantization(self) -> Callable[[], Quantization]:
        """The measure of quantization: every fourth passage calibrates, the others are scored."""
        passages = self._cut(self.context)
        if len(passages) < 2:
            cure = "give more --tokens or less --context"
            raise ValueError(f"quantization needs two passages, one to calibrate; {cure}")
        linear_layers(self.model)
        calibrates = torch.arange(len(passages)) % 4 == 1
        split = partial(torch.split, split_size_or_sections=max(1, self.batch_tokens // self.context))
        return partial(quantization_losses, self.model, split(passages[~calibrates]), split(passages[calibrates]))

    def _cut(self, length: int) -> torch.Tensor:
        """Passages of one length."""
        documents, num_tokens = cast(Dataset, self.documents), self.plan.num_tokens
        batches = cut_passages(documents, self.tokenizer, length=length, num_tokens=num_tokens, batch_size=1)
        ids = torch.cat([batch.ids for batch in batches])
        check_tokenizer(self.model, int(ids.max()), self.plan.model)
        return ids
