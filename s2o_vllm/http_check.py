"""Checks the settings of an HTTP request before vLLM reads it.

A refusal must come before a stream begins. vLLM takes JSON's ``true`` for 1, and some of its
endpoints (beam search, scoring) make sampling parameters that leave a request's settings out.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from .config import ConfigError, S2OConfig, plain, shown
from .requests import OF_REQUESTS, PREFIX, of_context, request_settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

XARGS = "vllm_xargs"
EXTRA_BODY = "extra_body"  # an argument of OpenAI's client, which sends its fields
# In every body that may ask for settings: a part of each key in lower case, whatever stands between
# its words, or what hides one (JSON's escapes of ASCII, encodings other than UTF-8).
MARKS = (b"vllm_xargs", b"extra_", b"s2o", b"sparsity", b"target", b"\\u00", b"\0")


class RequestCheck:
    """ASGI middleware: answers 400 to requests whose settings are refused, and notes the others'.

    Args:
        app: the next application.
        settings: returns the server's settings, or None where S2O is off.
    """

    def __init__(self, app: App, settings: Callable[[Message], S2OConfig | None]):
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or not is_json(scope):
            await self.app(scope, receive, send)
            return
        settings = self.settings(scope)
        if settings is None:
            await self.app(scope, receive, send)
            return
        body = await read(receive)
        if body is None:
            return  # the client has left
        try:
            of_context.set(settings_in(body, settings))
        except ConfigError as error:
            await refuse(str(error), scope["path"], send)
            return
        await self.app(scope, again(body, receive), send)


def is_json(scope: Message) -> bool:
    """Tell whether a request says that its body is JSON."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    return bool(b"json" in kind.lower())


async def read(receive: Receive) -> bytes | None:
    """Return a request's body, or None if the client leaves before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def again(body: bytes, receive: Receive) -> Receive:
    """Return a source of messages that begins with a body that was read."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def settings_in(body: bytes, server: S2OConfig) -> dict[str, float]:
    """Return the settings that a request's JSON body asks for.

    Raises:
        ConfigError: if they are refused, or stand where nobody reads them.
    """
    lower = body.lower()
    if not any(mark in lower for mark in MARKS):
        return {}
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return {}  # vLLM says what is wrong with it
    return settings_of_request(request, server) if isinstance(request, Mapping) else {}


def settings_of_request(request: Mapping[str, Any], server: S2OConfig) -> dict[str, float]:
    """Return the settings that a request's fields override; see :func:`settings_in`."""
    for key in request:
        if plain(key) in OF_REQUESTS or key.lower().startswith(PREFIX):
            place = f"{shown(PREFIX + plain(key))} in {XARGS}"
            raise ConfigError(f"s2o: {shown(key)} is a field of the request, must be {place}")
    if isinstance(body := request.get(EXTRA_BODY), Mapping) and (
        XARGS in body or any(plain(key) in OF_REQUESTS for key in body)
    ):
        where = f"what is in it beside the request's other fields, {XARGS} among them"
        raise ConfigError(f"s2o: {EXTRA_BODY!r} is a field of the request, must be {where}")
    sampling = request.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, Mapping) else None
    overrides: dict[str, float] = {}
    for own in (request.get(XARGS), extra):
        if isinstance(own, Mapping):
            overrides |= request_settings(own, server)
    return overrides


async def refuse(sentence: str, path: str, send: Send) -> None:
    """Answer 400 in the form that the path's clients read."""
    content: dict[str, Any]
    if path.endswith(("/v1/messages", "/v1/messages/count_tokens")):  # Anthropic's
        content = {"type": "error", "error": {"type": "BadRequestError", "message": sentence}}
    else:
        error = {"message": sentence, "type": "BadRequestError", "param": XARGS, "code": 400}
        content = {"error": error}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
