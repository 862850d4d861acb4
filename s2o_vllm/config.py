"""Settings: what they are, where they come from, and what is refused.

Imports nothing but the standard library: the argument parser needs it in every process.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

KEY = "s2o"  # the settings' place in vLLM's additional_config
FLAGS = "s2o_flags"  # beside it: those given as flags, until the sources are combined
ENV_PREFIX = "S2O_"
QUOTED = 100  # characters of a refused value that its sentence repeats

# What ranks the history, and how many queries share a list by default: single queries against
# low-rank keys (the wide one by more directions and every query), or the paper's mean query.
RANKINGS = {"low_rank": 64, "mean_query": 512}


class ConfigError(ValueError):
    """A setting was refused; the message is one sentence for the user."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class S2OConfig:
    """All settings of one server.

    Attributes:
        sparsity_budget: share of its history that a prefill query visits, on average over segments
            and a layer's heads; 1.0 is stock attention.
        target_error: share of softmax mass that a list may leave out: it ends there, or where the
            budget does; 0 is off. Not with ``mean_query``, whose scores are no probabilities.
        min_budget_tokens: history tokens that a query may visit however small the budget's share is
            of so short a history.
        stop_threshold: relative gain of softmax mass below which a tile ends; 0 is off.
        min_context: segments with less history than this many tokens stay dense.
        dense_where_faster: chunks of so few new tokens that ranking costs more than it saves stay
            dense (see :mod:`cost`), unless decode is sparse; on a CPU those are all.
        ranking: how the history is ranked, one of ``RANKINGS``.
        segment_size: queries that are ranked together (S2O's segment); 0 takes what suits the
            ranking.
        max_request_budget: the largest budget that a request may ask for; 0 forbids requests to
            ask for any.
        dense_layers: numbers of the layers that stay dense; negative ones count from the last.
        decode_budget: share of its history that a query of decode visits on average; 1.0 leaves
            decode to stock vLLM.
        decode_min_context: decode with less history than this many tokens stays dense.
        decode_requests: how many requests decode sparsely at a time; each takes memory.
        shadow_rate: share of sparse queries that are attended densely as well, to count the error.
        shadow_limit: mean relative error of these above which all prefill stays dense; 0 is off.
        self_test: whether each worker compares the kernels with their reference when it starts.
        status_page: whether the API server shows what S2O does, at ``/s2o``.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """

    sparsity_budget: float = 0.1
    target_error: float = 0.0
    min_budget_tokens: int = 0
    stop_threshold: float = 0.0
    min_context: int = 8192
    dense_where_faster: bool = True
    ranking: str = "low_rank"
    segment_size: int = 0
    max_request_budget: float = 1.0
    dense_layers: tuple[int, ...] = ()
    decode_budget: float = 1.0
    decode_min_context: int = 32768
    decode_requests: int = 4
    shadow_rate: float = 0.0
    shadow_limit: float = 0.0
    self_test: bool = False
    status_page: bool = False

    def __post_init__(self) -> None:
        check_budget("sparsity_budget", self.sparsity_budget)
        check_target("target_error", self.target_error, self.ranking)
        value = self.stop_threshold
        if not _number(value) or not 0 <= value < 1:
            raise refusal("stop_threshold", value, "a number from 0 (off) up to, not including, 1")
        for key in ("min_budget_tokens", "min_context"):
            tokens = getattr(self, key)
            if not _whole(tokens) or tokens < 0:
                raise refusal(key, tokens, "a whole number of tokens, 0 or more")
        value = self.segment_size
        if not _whole(value) or not (value == 0 or 16 <= value <= 4096):
            raise refusal("segment_size", value, "0 or a whole number of queries from 16 to 4096")
        if not isinstance(self.ranking, str) or self.ranking not in RANKINGS:
            raise refusal("ranking", self.ranking, f"one of {', '.join(RANKINGS)}")
        for key in ("dense_where_faster", "self_test", "status_page"):
            if not isinstance(getattr(self, key), bool):
                raise refusal(key, getattr(self, key), "true or false")
        value = self.max_request_budget
        if not _number(value) or not 0 <= value <= 1:
            raise refusal("max_request_budget", value, "a number from 0 (requests may ask for no "
                           "budget of their own) to 1")  # fmt: skip
        layers = self.dense_layers
        if not isinstance(layers, list | tuple) or not all(map(_whole, layers)):
            raise refusal("dense_layers", layers, "a list of layer numbers, such as 0,1,-1")
        object.__setattr__(self, "dense_layers", tuple(layers))  # JSON gives a list
        check_budget("decode_budget", self.decode_budget)
        value = self.decode_min_context
        if not _whole(value) or value < 0:
            raise refusal("decode_min_context", value, "a whole number of tokens, 0 or more")
        value = self.decode_requests
        if not _whole(value) or not 1 <= value <= 256:
            raise refusal("decode_requests", value, "a whole number of requests from 1 to 256")
        value = self.shadow_rate
        if not _number(value) or not 0 <= value <= 1:
            raise refusal("shadow_rate", value, "a number from 0 (off) to 1")
        value = self.shadow_limit
        if not _number(value) or not 0 <= value <= 10:
            raise refusal("shadow_limit", value, "a number from 0 (off) to 10")
        for field in fields(self):  # a kernel is compiled anew for whole numbers
            if field.type is float:
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    def decodes(self) -> bool:
        """Whether any decode is sparse."""
        return self.decode_budget < 1

    @property
    def segment(self) -> int:
        """Queries per segment."""
        return self.segment_size or RANKINGS[self.ranking]

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @property
    def summary(self) -> dict[str, str]:
        """The settings that decide how fast and how close to dense attention a server is."""
        return {
            "ranking": self.ranking,
            "budget": str(self.sparsity_budget),
            "min_budget_tokens": str(self.min_budget_tokens),
            "target_error": str(self.target_error),
            "min_context": str(self.min_context),
        }

    def for_layers(self, count: int) -> "S2OConfig":
        """Return the settings for a model of ``count`` layers: ``dense_layers`` from 0, in order.

        Raises:
            ConfigError: if the model has no such layer.
        """
        for layer in self.dense_layers:
            if not -count <= layer < count:
                raise ConfigError(
                    f"s2o: dense_layers has {layer}, must be from {-count} to {count - 1} "
                    f"(the model has {count} layers)"
                )
        return replace(self, dense_layers=tuple(sorted({i % count for i in self.dense_layers})))


HELP = {
    "sparsity_budget": "Share of its history that a prefill query visits on average "
    "(0 < B <= 1; 1 is stock attention). Default: 0.1.",
    "target_error": "Share of softmax mass that a list may leave out: it ends where its scores say "
    "so, at the latest where the budget does (not with mean_query). 0 switches it off. Default: 0.",
    "min_budget_tokens": "History tokens that a prefill query may visit however small the budget. "
    "Default: 0.",
    "stop_threshold": "Early stop: a tile ends once no query's softmax mass grows by this "
    "share. 0 switches it off. Default: 0.",
    "min_context": "Prefill with less history than this many tokens stays dense. Default: 8192.",
    "dense_where_faster": "Leave chunks with few new tokens behind a long history dense where that "
    "is faster, on a CPU all chunks (true or false). Default: true.",
    "ranking": "How the history is ranked: low_rank (single queries against low-rank keys) or "
    "mean_query (the paper's). Default: low_rank.",
    "segment_size": "Queries that are ranked together. Default: 64 (mean_query: 512).",
    "max_request_budget": "Largest sparsity budget that a request may ask for (sparsity_budget "
    "to 1); 0 forbids requests to ask for any. Default: 1.",
    "dense_layers": "Layers that stay dense, such as 0,1,-1; negative numbers count from the "
    "last (write --s2o-dense-layers=-1,0 where the first is negative). Default: none.",
    "decode_budget": "Share of its history that a query of decode visits on average (0 < B <= 1; "
    "1 leaves decode to stock vLLM). Default: 1.",
    "decode_min_context": "Decode with less history than this many tokens stays dense. "
    "Default: 32768.",
    "decode_requests": "Requests that decode sparsely at a time; others decode densely. Each takes "
    "some 6 % of its KV cache. Default: 4.",
    "shadow_rate": "Share of sparse queries that are attended densely as well, to count the "
    "true error (0 to 1); at most 32 a step. 0 switches it off. Default: 0.",
    "shadow_limit": "Mean relative error of these queries above which all prefill stays dense "
    "until a restart (needs --s2o-shadow-rate). 0 switches it off. Default: 0.",
    "self_test": "Compare the kernels with their reference on each worker's device when the server "
    "starts, and refuse to serve if they differ (true or false). Default: false.",
    "status_page": "Show a page at /s2o: density and error by layer, settings, lengths and times "
    "of the last requests (true or false). Open to whoever reaches /metrics. Default: false.",
}

# Settings that were removed, and why: giving one is refused with the reason.
REMOVED = {"permute_queries": "no measurement showed a use for it"}

FIELDS: dict[str, Any] = {field.name: field.type for field in fields(S2OConfig)}


def refusal(key: str, value: Any, allowed: str) -> ConfigError:
    """Return the refusal of a value, which names the key, the value and what is allowed."""
    return ConfigError(f"s2o: {key} is {shown(value)}, must be {allowed}")


def shown(value: Any) -> str:
    """Return a value as a sentence quotes it, at most ``QUOTED`` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def removed(key: str) -> ConfigError:
    """Return the refusal of a setting that was removed."""
    return ConfigError(f"s2o: {key} was removed ({REMOVED[key]}): leave it out")


def check_budget(key: str, value: Any) -> float:
    """Return a sparsity budget as a float.

    Raises:
        ConfigError: unless it is a number with 0 < value <= 1.
    """
    if not _number(value) or not 0 < value <= 1:
        raise refusal(key, value, "a number greater than 0 and at most 1")
    return float(value)


def check_target(key: str, value: Any, ranking: str) -> float:
    """Return a target error as a float.

    Raises:
        ConfigError: unless it is a number with 0 <= value < 1, and 0 for a ranking whose scores
            are no probabilities of single queries.
    """
    if not _number(value) or not 0 <= value < 1:
        raise refusal(key, value, "a number from 0 (off) up to, not including, 1")
    if value > 0 and ranking == "mean_query":
        raise refusal(key, value, "0 with ranking mean_query")
    return float(value)


def check(key: str, value: Any) -> Any:
    """Return the value of a setting that is given alone.

    Raises:
        ConfigError: if it is refused.
    """
    S2OConfig(**{key: value})
    return value


def parse_text(key: str, text: str) -> Any:
    """Read a setting from text (a flag or an environment variable).

    Raises:
        ConfigError: if the text is not of the setting's type.
    """
    kind = FIELDS[key]
    value: Any
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if key == "dense_layers":
            value = tuple(int(word) for word in text.split(",")) if text.strip() else ()
        else:
            value = kind(text)
    except (ValueError, KeyError):
        value = text
    return check(key, value)


def from_mapping(settings: Any, place: str = KEY) -> dict[str, Any]:
    """Check the keys of a JSON object of settings and return it.

    Args:
        settings: what is in that place of ``additional_config``.
        place: its key.

    Raises:
        ConfigError: if it is no object, or has an unknown key.
    """
    if not isinstance(settings, Mapping):
        raise refusal(f"additional_config {place!r}", settings, "a JSON object")
    for key in settings:
        if key in REMOVED:
            raise removed(key)
        if key not in FIELDS:
            known = ", ".join(FIELDS)
            raise ConfigError(f"s2o: unknown setting {shown(key)}, must be one of {known}")
    return dict(settings)


def plain(key: str) -> str:
    """Return a key as it would be with our spelling and without our prefix."""
    return key.lower().replace("-", "_").replace(".", "_").removeprefix(ENV_PREFIX.lower())


def given_in(additional: Any) -> tuple[dict[str, Any], Any]:
    """Return the settings that ``additional_config`` carries: those of flags, and its own.

    Args:
        additional: vLLM's; others may keep their settings in it, too.

    Raises:
        ConfigError: if a key of it is one of ours in another place or spelling.
    """
    if not isinstance(additional, Mapping):
        return {}, None
    for key in additional:
        if key in (KEY, FLAGS) or not str(key).lower().startswith(KEY):
            continue
        if plain(key) in REMOVED:
            raise removed(plain(key))
        if plain(key) in FIELDS:
            raise misplaced(key)
        raise ConfigError(f"s2o: additional_config has {shown(key)}, must be {KEY!r}")
    return from_mapping(additional.get(FLAGS, {}), FLAGS), additional.get(KEY)


def misplaced(key: str) -> ConfigError:
    """Return the refusal of a setting that stands beside ``additional_config["s2o"]``."""
    return ConfigError(
        f"s2o: additional_config has {key!r}, must be {plain(key)!r} in {KEY!r}: "
        f'{{"{KEY}": {{"{plain(key)}": ...}}}}'
    )


def settle(additional: Any) -> dict[str, Any]:
    """Return ``additional_config`` with all settings of a server in their place, as JSON types.

    Args:
        additional: vLLM's, with those of flags and its own; it is left as it is.

    Raises:
        ConfigError: at the first setting that is refused.
    """
    if not isinstance(additional, Mapping):
        raise refusal("additional_config", additional, "a JSON object")
    flags, own = given_in(additional)
    for key in additional:
        if key in FIELDS:
            raise misplaced(key)
    others = {key: value for key, value in additional.items() if key != FLAGS}
    return others | {KEY: resolve(flags, own).as_dict()}


def resolve(
    flags: Mapping[str, Any], additional: Any, environment: Mapping[str, str] | None = None
) -> S2OConfig:
    """Combine the sources of settings: flags over additional_config over environment.

    Args:
        flags: settings given as command-line flags, by key.
        additional: the value of ``additional_config["s2o"]``, or None.
        environment: variables; ``S2O_`` and the key in capitals. Default: ``os.environ``.

    Raises:
        ConfigError: at the first setting that is refused.
    """
    environment = os.environ if environment is None else environment
    for key in REMOVED:
        if ENV_PREFIX + key.upper() in environment:
            raise removed(key)
    settings = {
        key: parse_text(key, environment[ENV_PREFIX + key.upper()])
        for key in FIELDS
        if ENV_PREFIX + key.upper() in environment
    }
    settings |= from_mapping({} if additional is None else additional)
    settings |= flags
    result = S2OConfig(**settings)
    if 0 < result.max_request_budget < result.sparsity_budget:
        allowed = f"0 or at least sparsity_budget, which is {result.sparsity_budget}"
        raise refusal("max_request_budget", result.max_request_budget, allowed)
    if result.shadow_limit > 0 and result.shadow_rate == 0:
        raise refusal("shadow_limit", result.shadow_limit, "0 with shadow_rate 0")
    return result
