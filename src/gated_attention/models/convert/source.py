"""Find a checkpoint, in a local folder or on the hub, and check what else its folder holds."""

from pathlib import Path

import huggingface_hub

from gated_attention.models.convert.storage import find_weights, read_json

_WANTED = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*")


def find_source(source: str | Path) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub name, `owner/repository` or `owner/repository/folder`.

    Raises:
        ValueError: if there is no such folder or repository.
    """
    if not str(source):
        raise ValueError("the source is empty; give a folder, or a hub name, owner/repository")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    owner, *parts = str(source).split("/")
    if isinstance(source, Path) or not parts or not all([owner, *parts]) or owner in (".", "..", "~"):
        raise ValueError(f"{source} is not a folder; give one, or a hub name, owner/repository")
    name, inside = f"{owner}/{parts[0]}", "/".join(parts[1:])
    prefix = f"{inside}/" if inside else ""
    try:
        root = huggingface_hub.snapshot_download(
            name, allow_patterns=[prefix + pattern for pattern in _WANTED], ignore_patterns=[f"{prefix}*/*"]
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source} is not a folder, nor can the hub give it ({reason}); check the name") from error
    folder = Path(root) / inside
    if not folder.is_dir():
        raise ValueError(f"{name} on the hub has no folder {inside}; check the name")
    return folder


def check_adapter(folder: Path) -> None:
    """Refuse a folder with a PEFT adapter, which changes what its model computes."""
    if (folder / "adapter_config.json").is_file():
        raise adapter_error(str(folder))


def adapter_error(name: str) -> ValueError:
    """The error to raise for a PEFT adapter where a whole model is needed."""
    return ValueError(
        f"{name} holds a PEFT adapter (adapter_config.json), not a whole model; "
        "load it with peft, merge_and_unload(), and save the result"
    )


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a model's folder: an export would publish their targets.

    The hub's cache links the files of a snapshot to `blobs` beside `snapshots`; those links are followed.
    """
    homes = [folder.resolve()]
    snapshots = [place for place in homes[0].parents if place.name == "snapshots"]
    homes += [place.parent / "blobs" for place in snapshots if place.parent.name.startswith("models--")]
    weights = find_weights(folder)
    listed = read_json(weights).get("weight_map") if weights.suffix == ".json" else None
    shards = [folder / name for name in listed.values() if isinstance(name, str)] if isinstance(listed, dict) else []
    for path in sorted({*folder.iterdir(), *shards}):
        target = path.resolve()
        if path.is_file() and not any(target.is_relative_to(home) for home in homes):
            raise ValueError(f"{path} is a link to {target}, outside its folder; copy the file itself there")
