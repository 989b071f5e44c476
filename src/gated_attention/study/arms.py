"""A study as data: variants times seeds, the folder of each arm, and which arms are finished."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, PreTrainedConfig

from gated_attention.models.families.architectures import architecture_config, vision_config
from gated_attention.ranges import require_folder_name, require_once, require_within
from gated_attention.registry.architectures import Architecture
from gated_attention.registry.choices import TEXT, VISION
from gated_attention.registry.variants import Variant
from gated_attention.sizes import ModelSize, ParameterAccount
from gated_attention.study.record import CONFIG_NAME, RESULT_NAME, SCHEMA, UNSAID, Result, read_config, read_result
from gated_attention.train.callbacks import Progress
from gated_attention.train.checkpoints import last_checkpoint
from gated_attention.train.images.data import ImageConfig, ImageData
from gated_attention.train.text.data import DataConfig, PackedData
from gated_attention.train.text.tokenizer import vocabulary_size
from gated_attention.train.trainer import TrainConfig
from gated_attention.typed import contradict, first_difference


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a study trains; its records go to `<output>/runs/<name>/<variant>/seed<k>/`.

    Attributes:
        first_seed: The seeds are this and those after it.
        size: As the architecture fits it.
        table: Table of the paper whose rows the variants are; None if they were named.
        left_out: One sentence for each row of that table that is not among the variants, saying why.
        start: A study's folder, `runs/<name>`; weights are loaded from its arms of the same variant and seed.
        rope_theta: RoPE's base; None is that of `start`, or the configuration's.
        point: Name of the folder of one point of a study's grid; empty where the study is that one point.
        keep_checkpoints: Whether the last checkpoint of a finished arm stays.
    """

    name: str
    architecture: Architecture
    variants: tuple[Variant, ...]
    size: ModelSize
    seeds: int
    data: DataConfig | ImageConfig
    train: TrainConfig
    output: Path
    tensorboard: bool = False
    table: int | None = None
    left_out: tuple[str, ...] = ()
    start: Path | None = None
    rope_theta: float | None = None
    point: str = ""
    keep_checkpoints: bool = True
    first_seed: int = 0

    def __post_init__(self) -> None:
        require_folder_name("study name", self.name)
        require_within("seeds", self.seeds, least=1, most=10_000)
        require_within("first_seed", self.first_seed, least=0, most=10_000)
        require_within("rope_theta", self.rope_theta, above=1, most=1e15)
        if not self.variants:
            raise ValueError("a study needs at least one variant")
        require_once("variant", [variant.name for variant in self.variants])

    @property
    def task(self) -> str:
        """What is trained, `text` or `vision`."""
        return VISION if isinstance(self.data, ImageConfig) else TEXT

    @property
    def runs(self) -> Path:
        """The folder of the arms' folders."""
        return self.output / "runs" / self.name / self.point

    @property
    def arms(self) -> list["Arm"]:
        """Every variant with every seed, seeds outermost so that early results pair."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [Arm(self, variant, seed) for seed in seeds for variant in self.variants]


@dataclass(frozen=True, slots=True)
class Arm:
    """One variant trained with one seed."""

    plan: StudyPlan
    variant: Variant
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.name} seed {self.seed}" + f", {self.plan.point}" * bool(self.plan.point)

    @property
    def key(self) -> tuple[str, str, int]:
        """Identifies the arm within its study."""
        return self.plan.point, self.variant.name, self.seed

    @property
    def folder(self) -> Path:
        """Where this arm's records lie."""
        return self.plan.runs / self.variant.name / f"seed{self.seed}"

    @property
    def size(self) -> ModelSize:
        """The size at which this variant trains."""
        return self.variant.resize(self.plan.size)

    @property
    def training(self) -> TrainConfig:
        """The plan's training settings, adapted to this variant."""
        plan, variant = self.plan.train, self.variant
        auxiliary = replace(plan.auxiliary, gate_penalty=variant.gate_penalty or plan.auxiliary.gate_penalty)
        return replace(plan, learning_rate=plan.learning_rate * float(variant.learning_rate), auxiliary=auxiliary)

    @property
    def start(self) -> Path | None:
        """The checkpoint from which weights are loaded; None to initialise them.

        Raises:
            ValueError: if the study to start from has no such arm.
        """
        if self.plan.start is None:
            return None
        folder = self.plan.start / self.variant.name / f"seed{self.seed}"
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"{folder} has no checkpoint to start from; give --from a study that trained this arm")
        return checkpoint

    def model_config(self, data: PackedData | ImageData | None = None) -> PreTrainedConfig:
        """The model's configuration, with the vocabulary of the tokenizer or the labels of the images.

        Args:
            data: None stands for data with as many tokens or labels as the size has.
        """
        plan, block = self.plan, self.variant.block
        if isinstance(plan.data, ImageConfig):
            labels = data.labels if isinstance(data, ImageData) else tuple(map(str, range(self.size.vocab_size)))
            registers = self.variant.registers
            return vision_config(self.size, block, registers, image_size=plan.data.image_size, labels=labels)
        theta, known = plan.rope_theta, {"max_position_embeddings": plan.data.block_size}
        if isinstance(data, PackedData):
            if theta is None and self.start is not None and plan.architecture.rope_fraction is not None:
                theta = AutoConfig.from_pretrained(self.start).rope_parameters["rope_theta"]
            known |= {
                "vocab_size": vocabulary_size(data.tokenizer),
                "bos_token_id": data.tokenizer.bos_token_id,
                "eos_token_id": data.tokenizer.eos_token_id,
            }
        return architecture_config(plan.architecture, self.size, block, rope_theta=theta, **known)

    def resolve(self, parameters: ParameterAccount | None = None) -> dict[str, Any]:
        """All that determines this arm's numbers and is known before the data is read, as `config.json` stores it.

        Args:
            parameters: Of the model, once it is built.
        """
        variant, block, penalty = self.variant, self.variant.block, self.variant.gate_penalty
        training = asdict(self.training)
        del training["auxiliary"]["gate_penalty"]  # it belongs to the variant
        if not self.size.num_experts:
            del training["auxiliary"]  # only routers have its losses
        settings = {
            "variant": {
                "name": variant.name,
                "description": variant.describe(),
                "cites": list(variant.cites),
                **({"gate_penalty": asdict(penalty)} if penalty else {}),
            },
            "task": self.plan.task,
            "architecture": self.plan.architecture.name,
            "size": asdict(self.size),
            "block": {**asdict(block), "gates": [gate.to_dict() for gate in block.gates]},
            **({"parameters": parameters.to_dict()} if parameters else {}),
            "data": asdict(self.plan.data),
            "train": training,
            "start": str(self.start) if self.start else None,
            "rope_theta": self.plan.rope_theta,
        }
        identity = {"schema": SCHEMA, "study": self.plan.name, "variant": variant.name, "seed": self.seed}
        return {**identity, "config": settings}

    def finished(self) -> Result | None:
        """This arm's result; None if it is not finished.

        Raises:
            ValueError: if the folder holds an arm of other settings or of another schema.
        """
        wanted = self.resolve()["config"]
        result_path, config_path = self.folder / RESULT_NAME, self.folder / CONFIG_NAME
        result = read_result(result_path) if result_path.exists() else None
        if result is None and not config_path.exists():
            return None
        found = result.config if result else read_config(config_path)
        if difference := first_difference(found, wanted, UNSAID):
            raise ValueError(f"{self.folder} was run with {difference}; choose another name or --output")
        return result

    def check_data(self, data: PackedData | ImageData) -> None:
        """Refuse data other than what the arm was trained on, if it is finished or has a checkpoint.

        Raises:
            ValueError: if the files have changed since.
        """
        result_path, config_path = self.folder / RESULT_NAME, self.folder / CONFIG_NAME
        if result_path.exists():
            found = read_result(result_path).config
        elif config_path.exists() and last_checkpoint(self.folder) is not None:
            found = read_config(config_path)
        else:
            return
        if contradict(found.get(data.kind, {}), data.about):
            raise ValueError(
                f"{self.folder} was trained on other {data.kind} than {self.plan.data.source} holds now; bring that "
                "back, or choose another name or --output"
            )


class ArmObserver(Protocol):
    """Receives the progress of an arm."""

    def say(self, message: str) -> None:
        """A step begins that takes a while."""

    def start(self, arm: Arm) -> None:
        """An arm starts training."""

    def progress(self, arm: Arm, progress: Progress) -> None:
        """An arm made progress."""


class Observer(ArmObserver, Protocol):
    """Receives the progress of a study."""

    def finish(self, arm: Arm, result: Result, kept: bool) -> None:
        """An arm is finished, in this run or (`kept`) in an earlier one."""
