"""`evaluate`: one model by the paper's yardsticks, under plain RoPE and whatever overrides are asked for."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.evaluate.benchmarks import BENCHMARKS, RULER, BenchmarkScore, require_harness, run_benchmark
from gated_attention.evaluate.length import Damage, LengthLoss, damage_inside, length_losses
from gated_attention.evaluate.loss import evaluating
from gated_attention.evaluate.perplexity import Mode, Perplexity, average_domains, document_losses
from gated_attention.evaluate.quantization import Quantization, quantization_losses
from gated_attention.evaluate.retrieval import KINDS, Encode, RetrievalScore, make_samples, score_samples
from gated_attention.evaluate.rope import Rope, overridden, override_parameters
from gated_attention.studies.analyze import BATCH_TOKENS, Say
from gated_attention.studies.checkpoint import check_tokenizer, find_checkpoint, load_checkpoint
from gated_attention.studies.device import device_name
from gated_attention.studies.domain_text import read_domains, tokenise
from gated_attention.studies.passages import cut_passages
from gated_attention.train.corpus import load_documents

DEFAULT_CONTEXT = 4096
"""Tokens of context, if the model has as many positions."""

TASKS = ("perplexity", "length", "retrieval", "quantization", *BENCHMARKS, RULER)
"""What `--tasks` picks among."""

_OF_TEXT = {"perplexity", "length", "quantization"}
_FILLER_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What is measured of which model on which text.

    Attributes:
        model: Folder or hub name.
        tasks: Of `TASKS`.
        source, text_field, domain_field: As `train.corpus.load_documents`.
        num_tokens: Tokens of text that each task of text reads, about.
        context: Tokens of context; None is `DEFAULT_CONTEXT` or the model's positions if those are fewer.
        mode, stride: As `evaluate.perplexity.document_losses`; a stride of None is half the context.
        multiples: Lengths of the task `length`, in contexts.
        lengths: Tokens of the tasks `retrieval` and `ruler`; empty is the context.
        yarn: YaRN's factors, each a setting of its own beside plain RoPE.
        rope_theta: RoPE's base of settings other than plain.
        depths, num_samples, seed, filler: Of `retrieval`; a filler of None is generated.
        local, limit, shots, run_code: As `evaluate.benchmarks.run_benchmark`.
    """

    model: str
    tasks: tuple[str, ...] = ("perplexity",)
    source: str = "stdlib"
    text_field: str = "text"
    domain_field: str = "domain"
    num_tokens: int = 262_144
    context: int | None = None
    tokenizer: str | None = None
    mode: str = "start"
    stride: int | None = None
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = ()
    yarn: tuple[float, ...] = ()
    rope_theta: float | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_samples: int = 8
    seed: int = 0
    filler: str | None = None
    local: Path | None = None
    limit: int | None = None
    shots: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
        if not self.tasks:
            raise ValueError(f"no task is named; choose from {', '.join(TASKS)}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r}; choose from {', '.join(get_args(Mode))}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context is {self.context}; a token is scored from 2 on")
        for name, least in (("num_tokens", 1), ("num_samples", 1), ("limit", 1), ("stride", 1), ("shots", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if any(one < 1 for one in (*self.multiples, *self.lengths)) or 1 not in self.multiples:
            raise ValueError("multiples must be whole numbers from 1 on with 1 among them, and lengths at least 1")

    def ropes(self) -> list[Rope]:
        """Plain RoPE first, then the base's change alone, then YaRN by factor."""
        base = [Rope(self.rope_theta)] if self.rope_theta is not None else []
        return [Rope(), *base, *(Rope(self.rope_theta, factor) for factor in self.yarn)]


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
    """Everything that was found, plain RoPE first."""

    plan: EvaluationPlan
    label: str
    family: str
    num_parameters: int
    dtype: str
    device: str
    context: int
    ropes: tuple[RopeEvaluation, ...]
    quantization: Quantization | None


def evaluate(plan: EvaluationPlan, device: torch.device, say: Say = lambda message: None) -> Evaluation:
    """Run the tasks; everything that can be refused beforehand is.

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
    ropes: list[RopeEvaluation] = []
    for rope in plan.ropes():
        with overridden(model, rope, run.positions or run.context):
            ropes.append(run.under(rope, ropes[0] if ropes else None))
    return Evaluation(
        plan=plan,
        label=checkpoint.label,
        family=model.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=device_name(device),
        context=run.context,
        ropes=tuple(ropes),
        quantization=run.quantization() if "quantization" in plan.tasks else None,
    )


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

    def under(self, rope: Rope, plain: RopeEvaluation | None) -> RopeEvaluation:
        """All tasks but quantisation under one rotary embedding, which is in place already."""
        tasks = self.plan.tasks
        length = self._length(rope) if "length" in tasks else ()
        return RopeEvaluation(
            rope,
            self._perplexity(rope) if "perplexity" in tasks else None,
            length,
            damage_inside(plain.length[0], length[0]) if plain and length else None,
            self._retrieval(rope) if "retrieval" in tasks else (),
            tuple(score for task in tasks if task in {*BENCHMARKS, RULER} for score in self._benchmark(task, rope)),
        )

    def _perplexity(self, rope: Rope) -> Perplexity:
        mode = cast(Mode, self.plan.mode)
        self.say(f"perplexity, {rope.label}")
        documents, domains = read_domains(
            cast(Dataset, self.documents), self.tokenizer, num_tokens=self.plan.num_tokens, mode=mode,
            context=self.context,
        )  # fmt: skip
        if not documents:
            raise ValueError(f"{self.plan.source} has no document of two tokens; give more text")
        check_tokenizer(self.model, max(max(document.ids) for document in documents), self.plan.model)
        stride = self.plan.stride or max(1, self.context // 2)
        losses = document_losses(
            self.model, documents, mode=mode, context=self.context, stride=stride, batch_tokens=self.batch_tokens
        )
        return average_domains(losses, domains)

    def _passages(self, length: int) -> torch.Tensor:
        batches = cut_passages(
            cast(Dataset, self.documents), self.tokenizer, length=length, num_tokens=self.plan.num_tokens, batch_size=1
        )
        ids = torch.cat([batch.ids for batch in batches])
        check_tokenizer(self.model, int(ids.max()), self.plan.model)
        return ids

    def _length(self, rope: Rope) -> tuple[LengthLoss, ...]:
        self.say(f"length, {rope.label}")
        lengths = [multiple * self.context for multiple in sorted(set(self.plan.multiples))]
        passages = self._passages(lengths[-1])
        return tuple(length_losses(self.model, passages, self.context, lengths, self.batch_tokens))

    def _retrieval(self, rope: Rope) -> tuple[RetrievalScore, ...]:
        self.say(f"retrieval, {rope.label}")
        encode = plain_encoder(self.tokenizer)
        filler = read_filler(self.plan.filler)
        samples = [
            sample
            for kind in KINDS
            for length in self.lengths
            for sample in make_samples(
                kind, encode, length=length, depths=self.plan.depths, num_samples=self.plan.num_samples,
                seed=self.plan.seed, filler=filler,
            )
        ]  # fmt: skip
        return tuple(score_samples(self.model, encode, samples))

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
        if len(ids) < 2:
            raise ValueError("quantization needs two passages, one to calibrate; give more --tokens or less --context")
        calibrating = torch.arange(len(ids)) % 4 == 1
        split = partial(torch.split, split_size_or_sections=max(1, self.batch_tokens // self.context))
        return quantization_losses(self.model, split(ids[~calibrating]), split(ids[calibrating]))


def plain_encoder(tokenizer: Any) -> Encode:
    """Text to ids, nothing added."""
    return partial(_encode, tokenizer)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


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
