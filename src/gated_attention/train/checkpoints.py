"""A run's checkpoints: which is the last, and whether it still is what was written."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from gated_attention.files import write_text

SEAL_NAME = ".whole.json"
"""Written last into a checkpoint: SHA-256 of its files by name."""

_STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_UNSEALED = {SEAL_NAME, "README.md"}  # the card is written again when an arm has been measured
_SEAL = TypeAdapter(dict[str, str])


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint below `output` that was written to its end."""
    return next((checkpoint for checkpoint in _newest_first(output) if _has_state(checkpoint)), None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def tokens_seen(checkpoint: Path) -> int:
    """Tokens that a run had trained on when it wrote a checkpoint.

    Raises:
        ValueError: if the checkpoint does not say, as those of earlier versions do not.
    """
    count = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8")).get("num_input_tokens_seen", 0)
    if not count:
        raise ValueError(f"{checkpoint} does not count its tokens; train this arm again under another --name")
    return int(count)


def seal(checkpoint: Path) -> None:
    """Note what the files of a checkpoint hold, which says that it is whole; their modes become the umask's."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name not in _UNSEALED)
    mode = (checkpoint / _STATE_NAME).stat().st_mode  # safetensors leaves its own files to their owner alone
    for path in files:
        path.chmod(mode)
    write_text(checkpoint / SEAL_NAME, json.dumps({path.name: _digest(path) for path in files}, indent=1) + "\n")


def find_sound_checkpoint(output: Path, say: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint below `output` that training can go on from; `say` names those that it cannot.

    Newer ones that are damaged are removed, so that what is written in their place mixes with nothing.
    """
    damaged = []
    found = None
    for checkpoint in _newest_first(output):
        reason = find_damage(checkpoint)
        if reason is None:
            found = checkpoint
            break
        damaged.append((checkpoint, reason))
    goes_on = f"goes on from step {checkpoint_step(found)}" if found else "begins again from step 0"
    for checkpoint, reason in damaged:
        say(f"{checkpoint} is damaged ({reason}); training {goes_on}")
        shutil.rmtree(checkpoint, ignore_errors=True)  # a process of the same run may be faster
    return found


def keep_newest(output: Path) -> None:
    """Remove all checkpoints but the last: a finished run needs none to fall back to."""
    for checkpoint in _newest_first(output)[1:]:
        shutil.rmtree(checkpoint)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    One without a seal, of an older version or of transformers alone, is searched for what it must have.
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


def _has_state(checkpoint: Path) -> bool:
    state = checkpoint / _STATE_NAME  # the Trainer writes it last
    return state.is_file() and state.stat().st_size > 0


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
    if not _has_state(checkpoint):
        return f"{_STATE_NAME} is missing or empty"
    if (checkpoint / "rng_state_0.pth").exists():
        return None  # of several processes, which name and spread their files by themselves
    for name in _NEEDED:
        if not (checkpoint / name).is_file() or not (checkpoint / name).stat().st_size:
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
        with safe_open(path, "pt"):  # compares the header with the file's size
            pass
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
