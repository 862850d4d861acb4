"""Where requests enter vLLM: their settings are checked there, and salt their blocks.

Beside :mod:`compat` the only file that knows vLLM's internals.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from . import salted_blocks, status_page
from .compat import settings_of
from .config import ConfigError
from .http_check import XARGS, RequestCheck, settings_of_request
from .requests import PREFIX, cache_salt, of_context, request_settings
from .wrapping import loaded, wrap


def install() -> None:
    """Check requests wherever they enter this process. Idempotent."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "process_inputs", _process_inputs)
    salted_blocks.install()  # where the engine runs in this process
    if (app := loaded("vllm.entrypoints.launchers.app")) is not None:
        wrap(app, "init_entrypoints_middleware", _init_middleware)
    if (batch := loaded("vllm.entrypoints.launchers.run_batch")) is not None:
        wrap(batch.BatchRequestInput, "model_validate_json", _read_batch_line, static=True)
        wrap(batch, "run_request", _run_batch_request)
    if (beams := loaded("vllm.entrypoints.generate.beam_search.offline")) is not None:
        wrap(beams.BeamSearchOfflineMixin, "beam_search", _beam_search)


def _init_middleware(original: Callable, args: Any, app: Any, *more: Any) -> None:
    """Check requests inside of vLLM's own middleware, authentication among it."""
    app.add_middleware(RequestCheck, settings=lambda scope: settings_of(app.state.vllm_config))
    status_page.attach(app)
    original(args, app, *more)


def _read_batch_line(original: Callable, cls: type, line: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a line of a batch file, and let its settings be what they are: vLLM makes 1 of true."""
    request = original(cls, line, *args, **kwargs)
    body = request.body
    if isinstance(getattr(body, XARGS, None), Mapping):
        with suppress(ValueError, RecursionError):
            given = json.loads(line)["body"][XARGS]
            own = {key: value for key, value in given.items() if key.startswith(PREFIX)}
            setattr(body, XARGS, getattr(body, XARGS) | own)
    return request


def _beam_search(original: Callable, self: Any, prompts: Any, params: Any, *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
    """Search with the settings of ``params.extra_args``: parameters of beams have no such field.

    Raises:
        VLLMValidationError: if these are refused.
    """
    settings = settings_of(self.llm_engine.vllm_config)
    if settings is None:
        return original(self, prompts, params, *args, **kwargs)
    try:
        overrides = request_settings(getattr(params, "extra_args", None), settings)
    except ConfigError as error:
        raise _validation_error(error) from None
    token = of_context.set(overrides)
    try:
        return original(self, prompts, params, *args, **kwargs)
    finally:
        of_context.reset(token)


async def _run_batch_request(original: Callable, serve: Callable, request: Any, *more: Any) -> Any:
    """Check a line of a batch file as RequestCheck does a request."""
    body = request.body
    fields = (body.model_extra or {}) | {XARGS: getattr(body, XARGS, None)}
    handler = getattr(serve, "__self__", None)
    settings = settings_of(handler.engine_client.vllm_config) if handler else None
    try:
        if settings is not None:
            of_context.set(settings_of_request(fields, settings))
    except ConfigError as error:
        refusal = _validation_error(error)

        async def serve(_: Any) -> Any:
            raise refusal

    return await original(serve, request, *more)


def _validation_error(error: ConfigError) -> Exception:
    """Return a refusal as vLLM's error that is answered with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=XARGS)


def _process_inputs(original: Callable, self: Any, request_id: str, prompt: Any, params: Any,
                    *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    settings = settings_of(self.vllm_config)
    if settings is None:
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        overrides = request_settings(getattr(params, "extra_args", None), settings)
    except ConfigError as error:
        raise _validation_error(error) from None
    if not overrides and (overrides := of_context.get() or {}):
        params = params.clone()
        named = {PREFIX + key: value for key, value in overrides.items()}
        params.extra_args = (params.extra_args or {}) | named
    request = original(self, request_id, prompt, params, *args, **kwargs)
    request.cache_salt = cache_salt(request.cache_salt, settings, overrides)
    return request
