"""Replaces functions of another package, once, and finds what of it is loaded."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, wrapper: Callable, *, static: bool = False) -> None:
    """Replace ``owner.name`` by ``wrapper(original, ...)``, once.

    With ``static``, the original is a static or class method and is passed bound; the wrapper
    of a class method still receives the class it was called on. What a class inherits is replaced
    in that class alone.
    """
    original = inspect.getattr_static(owner, name)
    function = getattr(original, "__func__", original)
    if getattr(function, "s2o_wrapped", False):
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    wrapped.s2o_wrapped = True  # type: ignore[attr-defined]
    setattr(owner, name, type(original)(wrapped) if static else wrapped)


def loaded(name: str) -> Any:
    """Return a module if this process has loaded it, perhaps as the program that it runs."""
    main = sys.modules["__main__"]
    if getattr(getattr(main, "__spec__", None), "name", None) == name:
        return main
    return sys.modules.get(name)
