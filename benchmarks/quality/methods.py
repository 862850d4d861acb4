"""Every method by name, and the specs that name one with its settings.

The methods that serve are always there. Baselines, oracles and ablations are in
`benchmarks/research`, which a checkout has and a wheel leaves out.
"""

from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import Any

from .ranking import MeanQuery, Method
from .served import Served

RESEARCH = "s2o_vllm.benchmarks.research"


def _research() -> tuple[tuple[type[Method], ...], tuple[type[Method], ...]]:
    """Return the methods of `benchmarks/research`, and those of them that are compared."""
    if find_spec(RESEARCH) is None:
        return (), ()
    from ..research import methods

    return methods.METHODS, methods.COMPARED


_OTHERS, _COMPARED = _research()
_ALL: tuple[type[Method], ...] = (Served, MeanQuery, *_OTHERS)
METHODS = {method.name: method for method in _ALL}
DEFAULTS = (Served.name, *(method.name for method in _COMPARED))


def parse(spec: str) -> Method:
    """Build a method from ``name`` or ``name:setting=value,setting=value``."""
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        where = "" if _OTHERS else " (baselines need a checkout with benchmarks/research)"
        raise ValueError(f"There is no method {name!r}; there are {', '.join(METHODS)}{where}.")
    method = METHODS[name]
    types: dict[str, Any] = {field.name: type(field.default) for field in fields(method)}
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in types or not equals:
            raise ValueError(f"{name} has no setting {pair!r}; it has {', '.join(types)}.")
        try:
            settings[key] = types[key](value)
        except ValueError:
            raise ValueError(f"{name}'s {key} must be a number, not {value!r}.") from None
    return method(**settings)


def settings(method: Method) -> dict[str, Any]:
    """Return a method's settings but for its unit, as result rows store them."""
    return {key: value for key, value in asdict(method).items() if key != "unit"}
