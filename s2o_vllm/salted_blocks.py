"""Which blocks of the prefix cache a request's settings are part of: those that they may touch.

A request's salt carries its settings (:func:`requests.cache_salt`). vLLM hashes it into the first
block, so that prompts of different budgets share nothing. Tokens before ``min_context`` are
computed densely whatever the budget: here the settings move from the first block to the first one
that holds a later token, in the process that hashes blocks. Where this is not installed they stay
in the first block, which shares less.
"""

from collections.abc import Callable
from typing import Any

from .requests import split_salt
from .wrapping import loaded, wrap

CORE = "vllm.v1.engine.core"
# Modules that name the function which says what a hash holds beside tokens.
NAMING = (
    "vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager",
)  # fmt: skip
KIND = "cache_salt"  # by which vLLM tells a salt from other keys


def install() -> None:
    """Follow the engine core that is loaded in this process, if there is one. Idempotent."""
    if (core := loaded(CORE)) is not None:
        wrap(core, "get_request_block_hasher", _hasher)


def _hasher(original: Callable, *args: Any, **kwargs: Any) -> Callable:
    """Return vLLM's hasher, which moves settings as soon as a request has some."""
    hash_blocks = original(*args, **kwargs)

    def hasher(request: Any) -> Any:
        if split_salt(request.cache_salt) is not None:
            for module in filter(None, map(loaded, NAMING)):
                wrap(module, "generate_block_hash_extra_keys", _extra_keys)
        return hash_blocks(request)

    return hasher


def _extra_keys(original: Callable, request: Any, start: int, end: int, *args: Any,
                **kwargs: Any) -> Any:  # fmt: skip
    """Return what the hash of the block of tokens ``start`` to ``end`` holds beside its tokens."""
    keys, following = original(request, start, end, *args, **kwargs)
    parts = split_salt(request.cache_salt)
    if parts is None or parts.shared < end - start:
        return keys, following  # the first block holds a token that settings may touch
    if start == 0:
        whole = (KIND, request.cache_salt)
        keys = tuple((KIND, parts.own) if key == whole else key for key in keys or ())
    elif start <= parts.shared < end:
        keys = (*(keys or ()), (KIND, parts.mark))
    return keys, following
