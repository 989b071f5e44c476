"""JSON and TOML that people may have edited, checked against types; the first mismatch is one line with its place."""

import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

_T = TypeVar("_T")

_SHOWN = 60  # characters of a value in a message
_LONGEST_REASON = 300


def parse(kind: TypeAdapter[_T], text: str | bytes, place: Path | str, cure: str) -> _T:
    """The value of JSON text; nothing is converted but whole numbers to floats and lists to tuples.

    Args:
        place: Where the text stands, for the message.
        cure: What the reader of the message can do.

    Raises:
        ValueError: if it is not JSON, or a field is missing, unknown or of another type.
    """
    try:
        return kind.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{place} {_describe(error)}; {cure}") from error


def read_bytes(path: Path, cure: str) -> bytes:
    """The content of a file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {cure}") from error


def read_toml(path: Path, cure: str) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: if it cannot be read, or is not TOML.
    """
    content = read_bytes(path, cure)
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path} is not readable TOML ({error}); {cure}") from error


def require_known(keys: Iterable[str], known: Collection[str], place: Path | str) -> None:
    """Refuse a key that is not among the known ones, and name the nearest of them."""
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            cure = f"the nearest is {near[0]!r}" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"{place} has an unknown key {key!r}; {cure}")


def open_dict(title: str, /, **types: Any) -> Any:
    """A `TypedDict` that vouches for the fields that are there: any may be missing, and others are kept as they are."""
    kind: Any = TypedDict(title, types, total=False)  # type: ignore[misc]  # mypy wants a literal name
    return with_config(ConfigDict(extra="allow", strict=True))(kind)


def one_line(text: object) -> str:
    """An error's message, or any text, without line breaks and cut to a readable length."""
    return " ".join(str(text).split())[:_LONGEST_REASON]


def first_difference(
    found: Mapping[str, Any], wanted: Mapping[str, Any], unsaid: Mapping[str, Any] | None = None, path: str = ""
) -> str | None:
    """The first setting in which two configurations differ, in words; keys that only `found` has are ignored.

    Args:
        unsaid: What a missing key means.
    """
    unsaid = unsaid or {}
    for key, value in json.loads(json.dumps(wanted)).items():
        if key not in found and key not in unsaid:
            return f"an earlier version, which had no setting {path}{key}"
        other = found.get(key, unsaid.get(key))
        if isinstance(value, dict) and isinstance(other, dict):
            if difference := first_difference(other, value, unsaid, f"{path}{key}."):
                return difference
        elif other != value:
            return f"{path}{key} {other!r}, not {value!r}"
    return None


def contradict(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions differ in what both of them say."""
    return any(one[key] != other[key] for key in one.keys() & other.keys())


def _describe(error: ValidationError) -> str:
    """The first mismatch in words, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False)
    message = one_line(first["msg"])
    if first["type"] == "json_invalid":
        return f"is not readable JSON ({message.removeprefix('Invalid JSON: ')})"
    field = ".".join(str(part) for part in first["loc"])
    at = f"has {field!r} wrong" if field else "is wrong"
    shown = one_line(repr(first["input"]))
    value = "" if first["type"] == "missing" or len(shown) > _SHOWN else f", not {shown}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{at}: {message[0].lower()}{message[1:]}{value}{more}"
