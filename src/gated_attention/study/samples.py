"""What a trained arm writes: greedy continuations of a few held-out passages."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, with_config
from transformers import PreTrainedModel

from gated_attention.nn.eval_mode import evaluating
from gated_attention.study.record import CLOSED, write_json
from gated_attention.train.text.data import PackedData
from gated_attention.typed import parse, read_bytes

SAMPLES_NAME = "samples.json"

NUM_SAMPLES = 3
PROMPT_TOKENS = 64
NEW_TOKENS = 64


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class Sample:
    """A passage of held-out text, how it goes on, and how the model continues it."""

    prompt: str
    held_out: str
    continuation: str


_SAMPLES = TypeAdapter(tuple[Sample, ...])


def write_samples(path: Path, model: PreTrainedModel, data: PackedData, autocast: torch.autocast) -> None:
    """Let the model continue the first tokens of evenly spaced held-out blocks, always with its likeliest token."""
    block_size = data.validation.ids.shape[1]
    blocks = data.validation.undivided().sample(NUM_SAMPLES * block_size)
    (ids,) = blocks.id_batches(NUM_SAMPLES)
    length = min(PROMPT_TOKENS, block_size // 2)
    end = length + min(NEW_TOKENS, block_size - length)
    with evaluating(model) as device, autocast:
        prompts = ids[:, :length].to(device)
        written = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_length=end, do_sample=False,
            pad_token_id=data.tokenizer.eos_token_id,
        )  # fmt: skip
    parts = (ids[:, :length], ids[:, length:end], written[:, length:])
    texts = [data.tokenizer.batch_decode(part.tolist(), skip_special_tokens=True) for part in parts]
    write_json(path, [asdict(Sample(*one)) for one in zip(*texts, strict=True)])


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The samples of an arm; empty for an arm of before they were written.

    Raises:
        ValueError: if the file does not hold samples.
    """
    if not path.exists():
        return ()
    cure = "remove the file"
    return parse(_SAMPLES, read_bytes(path, cure), path, cure)
