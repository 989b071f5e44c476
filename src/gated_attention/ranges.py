"""Checks of values that callers give, and runs of numbers in words.

Each check raises a ValueError of one line: the value, and what it must be.

Imports nothing heavy, so that a wrong value is refused before PyTorch loads.
"""

from collections.abc import Collection, Iterable, Sequence
from math import inf


def require_within(
    name: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse a number that is out of range or not finite; None stands for a default and passes."""
    if value is None:
        return
    fits = (
        -inf < value < inf  # not `isfinite`, which torch.compile does not trace of a dynamic number
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (most is None or value <= most)
    )
    if not fits:
        bounds = {"at least": least, "above": above, "below": below, "at most": most}
        words = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)
        raise ValueError(f"{name} is {value}; it must be {words or 'finite'}")


def require_choice(what: str, name: object, choices: Collection[object]) -> None:
    """Refuse a name that is not among the choices."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(map(str, choices))}")


def require_once(what: str, values: Sequence[object]) -> None:
    """Refuse a list that repeats a value."""
    if (repeated := next((value for value in values if values.count(value) > 1), None)) is not None:
        raise ValueError(f"{what} {repeated} is named twice; name each once")


def require_folder_name(what: str, name: str) -> None:
    """Refuse what cannot name a single folder: paths, names that hide or look like options."""
    reasons = {
        "it is empty": not name.strip(),
        "it has a slash": "/" in name or "\\" in name,
        "it begins with a dot or a dash": name.startswith((".", "-")),
        "it begins or ends with a space": name != name.strip(),
        "it has characters that cannot be printed": not name.isprintable(),
        "it takes more than 200 bytes": len(name.encode("utf-8", "surrogatepass")) > 200,
    }
    if reason := next((words for words, holds in reasons.items() if holds), None):
        raise ValueError(f"{what} {name[:40]!r} cannot name a folder: {reason}; choose letters, digits, - and _")


def consecutive_runs(numbers: Iterable[int], between: str) -> str:
    """Ascending numbers with runs drawn together: `1, 3-6` with "-" between a run's ends."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{between}{run[-1]}" for run in runs)
