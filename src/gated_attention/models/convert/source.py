"""Where a checkpoint lies: a local folder, or one fetched from the hub."""

from pathlib import Path

import huggingface_hub

_WANTED = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
_PARTS_OF_A_NAME = 2


def find_source(source: str | Path) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub name, `owner/repository` or `owner/repository/folder`.

    Raises:
        ValueError: if there is no such folder or repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) < _PARTS_OF_A_NAME or not all(parts) or parts[0] in (".", "..", "~"):
        raise ValueError(f"{source} is no folder; give one, or a hub name, owner/repository")
    name, inside = "/".join(parts[:_PARTS_OF_A_NAME]), "/".join(parts[_PARTS_OF_A_NAME:])
    prefix = f"{inside}/" if inside else ""
    try:
        root = huggingface_hub.snapshot_download(
            name, allow_patterns=[prefix + pattern for pattern in _WANTED], ignore_patterns=[f"{prefix}*/*"]
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source} is no folder, and the hub does not give it ({reason}); check the name") from error
    folder = Path(root) / inside
    if not folder.is_dir():
        raise ValueError(f"{name} on the hub has no folder {inside}; check the name")
    return folder
