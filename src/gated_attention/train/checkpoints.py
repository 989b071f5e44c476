"""The checkpoints of a run: which is the last, whether it is undamaged, and its weights."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from gated_attention.files import write_text
from gated_attention.models.saved.loading import load_model
from gated_attention.train.quiet import quiet

SEAL_NAME = ".whole.json"
"""The last file of a checkpoint to be written: SHA-256 of the others by name."""

_STATE_NAME = "trainer_state.json"  # the last file that the Trainer writes
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_UNSEALED = {SEAL_NAME, "README.md"}  # the card is rewritten when an arm has been measured
_SEAL = TypeAdapter(dict[str, str])


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint below `output`."""
    checkpoints = _newest_first(output)
    return next((checkpoint for checkpoint in checkpoints if _is_filled(checkpoint / _STATE_NAME)), None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def tokens_seen(checkpoint: Path) -> int:
    """Tokens that a run had trained on when it wrote a checkpoint.

    Raises:
        ValueError: if the checkpoint has no count, as those of earlier versions.
    """
    count = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8")).get("num_input_tokens_seen", 0)
    if not count:
        raise ValueError(f"{checkpoint} does not count its tokens; train this arm again under another --name")
    return int(count)


def seal(checkpoint: Path) -> None:
    """Record digests of a checkpoint's files, which marks it as complete; file modes then follow the umask."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name not in _UNSEALED)
    mode = (checkpoint / _STATE_NAME).stat().st_mode  # safetensors lets only the owner read its files
    for path in files:
        path.chmod(mode)
    write_text(checkpoint / SEAL_NAME, json.dumps({path.name: _digest(path) for path in files}, indent=1) + "\n")


def find_sound_checkpoint(output: Path, say: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint below `output` from which training can continue.

    `say` names newer ones that are damaged. They are removed, so that their files do not mix with those written later.
    """
    damaged, sound = {}, None
    for checkpoint in _newest_first(output):
        reason = find_damage(checkpoint)
        if reason is None:
            sound = checkpoint
            break
        damaged[checkpoint] = reason
    continues = f"continues from step {checkpoint_step(sound)}" if sound else "restarts from step 0"
    for checkpoint, reason in damaged.items():
        say(f"{checkpoint} is damaged ({reason}); training {continues}")
        shutil.rmtree(checkpoint, ignore_errors=True)  # another process of the same run may have removed it
    return sound


def keep_newest(output: Path, count: int = 1) -> None:
    """Remove all checkpoints but the last: a finished run needs no other."""
    for checkpoint in _newest_first(output)[count:]:
        shutil.rmtree(checkpoint)


def find_damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint in words, or None.

    One without a seal, from an older version or from transformers alone, is checked for the files that it needs.
    """
    try:
        if (checkpoint / SEAL_NAME).exists():
            return _against_seal(checkpoint)
        return _without_seal(checkpoint)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return " ".join(str(error).split())[:200]


def _newest_first(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _against_seal(checkpoint: Path) -> str | None:
    sealed = _SEAL.validate_json((checkpoint / SEAL_NAME).read_bytes())
    if _STATE_NAME not in sealed:
        return f"{SEAL_NAME} does not name {_STATE_NAME}"
    for name, digest in sealed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not what was written"
    return None


def _without_seal(checkpoint: Path) -> str | None:
    if not _is_filled(checkpoint / _STATE_NAME):
        return f"{_STATE_NAME} is missing or empty"
    if (checkpoint / "rng_state_0.pth").exists():
        return None  # several processes name and distribute their files in their own way
    for name in _NEEDED:
        if not _is_filled(checkpoint / name):
            return f"{name} is missing or empty"
    for name in ("config.json", _STATE_NAME):
        content: Any = json.loads((checkpoint / name).read_bytes())
        if not isinstance(content, dict):
            return f"{name} is no object"
    if content.get("global_step") != checkpoint_step(checkpoint):
        return f"{_STATE_NAME} is of step {content.get('global_step')}"
    weights = sorted(checkpoint.glob("model*.safetensors"))
    if not weights:
        return "model.safetensors is missing"
    for path in weights:
        with safe_open(path, "pt"):  # compares its header with the size of the file
            pass
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model through `from_pretrained`, which knows how experts are stored.

    Raises:
        ValueError: if the checkpoint is incomplete.
    """
    with quiet(logging.ERROR):
        saved = load_model(type(model), checkpoint, dtype="auto")
    model.load_state_dict(saved.state_dict())
