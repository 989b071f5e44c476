"""Training settings that suit each size, as data; the command line changes single fields of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults of a study at one size.

    Attributes:
        steps: Optimizer steps.
        warmup: As `train.trainer.TrainConfig.warmup`.
        batch_size: Sequences per pass; a step makes `accumulation` passes.
        tokenizer: As `train.data.DataConfig.tokenizer`.
        validation_tokens: How much held-out text is scored at the end of a run.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    warmup: float = 0.02
    tokenizer: str = "bpe-16384"
    validation_tokens: int = 2_000_000


SETTINGS: dict[str, Settings] = {
    "tiny": Settings(240, 8, 4e-3, tokenizer="bytes", validation_tokens=60_000),
    "xs": Settings(1_500, 32, 4e-3),
    "s": Settings(3_000, 32, 2e-3),
    "m": Settings(6_000, 32, 2e-3),
    "moe-tiny": Settings(240, 8, 4e-3, tokenizer="bytes", validation_tokens=60_000),
    "moe-xs": Settings(1_500, 32, 2e-3),
    "moe-s": Settings(3_000, 32, 2e-3),
    "1.7b-28l": Settings(100_000, 8, 4e-3, accumulation=128),
    "1.7b-48l": Settings(100_000, 8, 4e-3, accumulation=128),
    "15a2b": Settings(100_000, 8, 2e-3, accumulation=128, warmup=0.01),
}
"""By size: small ones reach a clear loss in minutes; Table 7's follow the paper (batch 1024, 100k steps, and the MoE's
warm-up of 1k steps to 2e-3)."""
