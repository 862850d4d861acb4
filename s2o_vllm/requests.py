"""What a request asks for: its settings, its budget, its prefix-cache salt."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from .config import ConfigError, S2OConfig, check_budget, check_target, plain, refusal, shown

PREFIX = "s2o_"
OF_REQUESTS = ("sparsity_budget", "target_error")  # settings that requests may ask for
OF_DECODE = ("decode_budget", "decode_min_context", "decode_requests")
INFINITE = 1 << 62
SALT = "|s2o:"  # what we add to a user's salt begins so
DENSE, SHARED = "dense", "prefix"
# Settings that decide what is served or measured, and not what keys and values are.
NOT_OF_KEYS = ("max_request_budget", "shadow_rate", "shadow_limit", "self_test", "status_page")


class RequestBudget(NamedTuple):
    """What a request's queries may visit.

    Attributes:
        sparsity_budget: share of its history that is visited, the request's own or the server's.
        target_error: share of softmax mass that a list may leave out, likewise.
        prompt: tokens of its prompt, 0 if not known.
        min_budget_tokens: history tokens that a query may visit however small the share is.
    """

    sparsity_budget: float
    target_error: float
    prompt: int = 0
    min_budget_tokens: int = 0


class RequestInfo(NamedTuple):
    """What is known of a request.

    Attributes:
        settings: those that it asks for.
        prompt: tokens of its prompt, 0 if not known.
        name: vLLM's own.
    """

    settings: dict[str, float]
    prompt: int
    name: str | None = None


PADDING = RequestInfo({}, 0)  # a row without a request

# What the request that is being served asks for, checked, where its sampling parameters may not
# say so: beam search and scoring make their own.
of_context: ContextVar[dict[str, float] | None] = ContextVar("s2o_request", default=None)


def budget_of(request: RequestInfo, server: S2OConfig) -> RequestBudget:
    """Return what a request may visit: what it asks for, else the server's settings."""
    own = {key: getattr(server, key) for key in OF_REQUESTS} | request.settings
    return RequestBudget(**own, prompt=request.prompt, min_budget_tokens=server.min_budget_tokens)


def request_settings(
    extra_args: Mapping[str, Any] | None, server: S2OConfig | None = None
) -> dict[str, float]:
    """Return the settings that a request overrides in its ``vllm_xargs``: of ``OF_REQUESTS``.

    Args:
        extra_args: all of the request's ``vllm_xargs``.
        server: the server's settings, which bound them. Default: everything is allowed.

    Raises:
        ConfigError: if one is malformed or more than the server allows, or a key is one of ours in
            another spelling, without its prefix or unknown.
    """
    server = server or S2OConfig()
    overrides = {}
    for key, value in (extra_args or {}).items():
        if key == PREFIX + "sparsity_budget":
            overrides["sparsity_budget"] = check_budget(key, value)
            if server.max_request_budget == 0:
                raise refusal(key, value, "left out: this server allows no budget of a request's")
            if value > server.max_request_budget:
                raise refusal(key, value, f"at most {server.max_request_budget} on this server")
        elif key == PREFIX + "target_error":
            overrides["target_error"] = check_target(key, value, server.ranking)
        elif isinstance(key, str) and (key.lower().startswith(PREFIX) or plain(key) in OF_REQUESTS):
            known = " or ".join(PREFIX + name for name in OF_REQUESTS)
            raise ConfigError(f"s2o: unknown request setting {shown(key)}, must be {known}")
    return overrides


class SaltParts(NamedTuple):
    """A salt whose settings are of no matter to the first blocks.

    Attributes:
        own: the salt of the first block: the user's, and ours without settings.
        shared: tokens at the start of a prompt that no setting touches.
        mark: settings that touch the keys and values of later ones.
    """

    own: str
    shared: int
    mark: str


def cache_salt(salt: str | None, config: S2OConfig, overrides: Mapping[str, float]) -> str:
    """Return the prefix-cache salt of a request.

    Keys and values above the first layer depend on how sparsely the layers below attended,
    and block hashes cover tokens only: blocks computed under different settings must differ
    in their salt. The user's own salt is kept. A budget of 1 shares with no other: its blocks are
    stock attention's to the bit, and those of a sparse chunk's dense segments are not.

    Args:
        salt: the user's own.
        config: the server's settings.
        overrides: the request's, as `request_settings` returns them.
    """
    settings = config.as_dict() | dict(overrides) | {"segment_size": config.segment}
    for key in NOT_OF_KEYS:
        del settings[key]
    if not config.decodes:
        for key in OF_DECODE:
            del settings[key]
    if settings["sparsity_budget"] == 1:
        return f"{salt or ''}{SALT}{DENSE}"
    shared = min(config.min_context, config.decode_min_context if config.decodes else INFINITE)
    mark = ",".join(f"{key}={value}" for key, value in settings.items())
    return f"{salt or ''}{SALT}{SHARED}@{shared}:{mark}"


def split_salt(salt: str | None) -> SaltParts | None:
    """Take a salt of :func:`cache_salt` apart; None where settings belong to the first block.

    What a user puts into his own salt stands before the last ``SALT``, and is not looked into.
    """
    user, found, ours = (salt or "").rpartition(SALT)
    place, _, mark = ours.partition(":")
    name, _, shared = place.partition("@")
    if not found or name != SHARED or not shared.isdecimal():
        return None
    return SaltParts(f"{user}{SALT}{SHARED}", int(shared), f"{SALT}{mark}")
