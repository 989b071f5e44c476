"""Default training settings of each model size, as data; the command line overrides single fields."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults of a study at one size.

    Attributes:
        batch_size: Sequences per pass; one optimizer step makes `accumulation` passes.
        warmup: As `train.trainer.TrainConfig.warmup`.
        tokenizer: As `train.text.data.DataConfig.tokenizer`.
        validation_tokens: Held-out tokens that are scored at the end of a run.
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
"""By size. Small sizes reach a clear loss in minutes. Table 7's sizes follow the paper: batch 1024, 100k steps, and for
the MoE a warm-up of 1k steps to 2e-3."""

SUSTAINED = {"H200": 1.8e14, "H100": 1.8e14, "A100": 8e13}
"""FLOP/s that training reaches by name of GPU: size `s`, compiled, bfloat16; see reports/main-s for the first two."""
