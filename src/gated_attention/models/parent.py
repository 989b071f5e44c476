"""What our classes take from their transformers parents as it stands, in whatever version is installed."""

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from types import CodeType, FunctionType
from typing import Any

from transformers import Cache
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

CACHE_NAME = "cache" if "cache" in signature(Qwen3Attention.forward).parameters else "past_key_values"
"""What forward passes and outputs call the cache: transformers 5.24 renamed it, and knows the old name until 5.40."""

_CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values")))


def init_with(parent: type, **classes: Any) -> Callable[..., None]:
    """The constructor of `parent`, building our classes where it names its own.

    Nothing is built and thrown away, and attributes that a later version adds are there.

    Args:
        classes: By the parent's name for each, which is a global of its module.

    Raises:
        TypeError: if the constructor does not use one of the names.
    """
    init = parent.__init__  # type: ignore[misc]
    if missing := classes.keys() - set(_global_names(init.__code__)):
        raise TypeError(f"{parent.__qualname__} of this transformers builds no {', '.join(sorted(missing))}")
    built = FunctionType(
        init.__code__, {**init.__globals__, **classes}, init.__name__, init.__defaults__, init.__closure__
    )
    built.__kwdefaults__ = init.__kwdefaults__
    return wraps(init)(built)


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def take_cache(kwargs: dict[str, Any], cache: Cache | None = None) -> Cache | None:
    """The cache that a layer was given, under either of its names, taken out of the arguments.

    Before 5.24 `cache` is the paged one, which the attention function updates by itself: it stays.
    """
    for name in _CACHE_NAMES:
        given = kwargs.pop(name, None)
        cache = given if cache is None else cache
    return cache


def update_cache(cache: Any, key: Any, value: Any, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Store keys and values, (B, K, T, D), and return all that the layer's queries may see.

    Args:
        kwargs: Of the attention function; the paged cache of transformers 5.24 adds to them.
    """
    if CACHE_NAME == "cache":
        key, value = cache.update(key, value, layer_idx, kwargs=kwargs)
    else:
        key, value = cache.update(key, value, layer_idx)
    return key, value
