"""What `evaluate` is asked for, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from gated_attention.evaluate.benchmarks import RULER
from gated_attention.evaluate.perplexity import Mode
from gated_attention.evaluate.rope import Rope
from gated_attention.ranges import require_choice, require_once, require_within
from gated_attention.registry.choices import TASKS

MOST_TOKENS = 2**40
"""More than any text has."""

_LEAST = {"context": 2, "num_tokens": 1, "num_samples": 1, "limit": 1, "stride": 1, "shots": 0, "seed": 0}


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What is measured of which model on which text.

    Attributes:
        model: Folder or hub name.
        tasks: Among `TASKS`.
        source, text_field, domain_field: As `train.text.corpus.load_documents`.
        num_tokens: Tokens that each task of text reads, about.
        context: Tokens of context; None is `DEFAULT_CONTEXT`, or the model's positions if fewer.
        mode, stride: As `evaluate.perplexity.document_losses`; a stride of None is half the context.
        multiples: Lengths of the task `length`, in contexts.
        lengths: Tokens of the tasks `retrieval` and `ruler`; empty is the context.
        yarn: YaRN factors, each evaluated beside plain RoPE.
        rope_theta: RoPE's base in all settings but the plain one.
        depths, num_samples, seed, filler: As `evaluate.retrieval.make_samples`; the filler is a source of text.
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
    mode: Mode = "start"
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
            require_choice("task", task, TASKS)
        require_once("task", self.tasks)
        if not self.tasks:
            raise ValueError(f"no task is named; choose from {', '.join(TASKS)}")
        require_choice("mode", self.mode, get_args(Mode))
        for name, least in _LEAST.items():
            require_within(name, getattr(self, name), least=least, most=MOST_TOKENS)
        require_within("rope_theta", self.rope_theta, above=1, most=1e15)
        lists: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
            "multiple": (self.multiples, {"least": 1, "most": 4096}),
            "length": (self.lengths, {"least": 1, "most": MOST_TOKENS}),
            "yarn": (self.yarn, {"above": 1, "most": 4096}),
            "depth": (self.depths, {"least": 0, "most": 1}),
        }
        for name, (values, bounds) in lists.items():
            require_once(name, values)
            for value in values:
                require_within(name, value, **bounds)
        retrieves = {"retrieval", RULER} & set(self.tasks)
        unread = {
            "--stride is for --mode sliding": self.stride is not None and self.mode != "sliding",
            "--lengths is for the tasks retrieval and ruler": self.lengths and not retrieves,
            "--filler is for the task retrieval": self.filler is not None and "retrieval" not in self.tasks,
        }
        if reason := next((words for words, holds in unread.items() if holds), None):
            raise ValueError(f"{reason}; leave it out")
        if 1 not in self.multiples:
            raise ValueError("1 is not among the multiples; the length of one context is what the others compare with")
        if "retrieval" in self.tasks and not self.depths:
            raise ValueError("retrieval needs a depth; give --depths, e.g. 0,0.5,1")
        if self.local is not None and not self.local.is_dir():
            raise ValueError(f"{self.local} is not a folder; give the folder of the benchmarks' files")

    def ropes(self) -> list[Rope]:
        """Plain RoPE first, then the changed base alone, then YaRN by factor."""
        base = [Rope(self.rope_theta)] if self.rope_theta is not None else []
        return [Rope(), *base, *(Rope(self.rope_theta, factor) for factor in self.yarn)]
