"""JSON that people may have edited, held to its types; what does not fit is one line with file and field."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

_T = TypeVar("_T")

_SHOWN = 60  # characters of a value in a message


def parse(kind: TypeAdapter[_T], text: str | bytes, place: Path | str, cure: str) -> _T:
    """The value that JSON text holds, nothing converted but whole numbers to floats and lists to tuples.

    Args:
        kind: What it has to be.
        text: The JSON.
        place: Where the text stands, for the message.
        cure: What the reader of the message can do.

    Raises:
        ValueError: if it is no JSON, or a field is missing, of another type or not known.
    """
    try:
        return kind.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{place} {describe(error)}; {cure}") from error


def read_json(kind: TypeAdapter[_T], path: Path, cure: str) -> _T:
    """As `parse`, of a file.

    Raises:
        ValueError: also if the file cannot be read.
    """
    return parse(kind, read_bytes(path, cure), path, cure)


def read_bytes(path: Path, cure: str) -> bytes:
    """A file's content.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {cure}") from error


def describe(error: ValidationError) -> str:
    """The first fault in words, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False)
    more = f" (and {len(others)} more)" if others else ""
    message = " ".join(first["msg"].split())
    if first["type"] == "json_invalid":
        return f"is not readable JSON ({message.removeprefix('Invalid JSON: ')})"
    field = ".".join(str(part) for part in first["loc"])
    at = f"has {field!r} wrong" if field else "is wrong"
    shown = " ".join(repr(first["input"]).split())
    value = "" if first["type"] == "missing" or len(shown) > _SHOWN else f", not {shown}"
    return f"{at}: {message[0].lower()}{message[1:]}{value}{more}"
