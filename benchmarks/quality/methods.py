"""Every method by name, and the specs that name one with its settings."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .baselines.blocks import BlockMean, FlashPrefill, FlexPrefill
from .baselines.oracles import BlockOracle, TokenOracle
from .baselines.pbs import PBS
from .baselines.token import S2OPaper, VecAttention
from .baselines.xattention import XAttention
from .ranking import LowRank, MeanQuery, Method
from .served import Served


@dataclass(frozen=True)
class S2O(LowRank):
    """Our method with the settings that `LOG.md` ends with: where the kernels are to go.

    One list for 32 queries of a GQA group; a rank-32 basis of the whole history, fitted to the
    last 2,048 queries by two steps of subspace iteration; no exponential per element.
    """

    unit: str = "32xkv"
    chunk: int = 0
    queries: int = 2048
    basis: str = "random2"
    reduce: str = "max-max16"

    name: ClassVar[str] = "s2o"


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Served,
        S2O,
        S2OPaper,
        PBS,
        BlockMean,
        FlexPrefill,
        XAttention,
        VecAttention,
        FlashPrefill,
        BlockOracle,
        TokenOracle,
        MeanQuery,
        LowRank,
    )
}
DEFAULTS = (
    "served",
    "s2o",
    "s2o_paper",
    "pbs",
    "block_mean",
    "flexprefill",
    "xattention",
    "vecattention",
    "flashprefill",
    "block_oracle",
    "token_oracle",
)


def parse(spec: str) -> Method:
    """Build a method from ``name`` or ``name:setting=value,setting=value``."""
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
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
