"""What is checked of a request before vLLM reads it, without a server."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from s2o_vllm import request_hooks
from s2o_vllm.config import ConfigError, S2OConfig
from s2o_vllm.http_check import RequestCheck, settings_in
from s2o_vllm.requests import of_context

SERVER = S2OConfig(sparsity_budget=0.2, max_request_budget=0.5)
HEADERS = [(b"content-type", b"application/json; charset=utf-8")]


def serve(body, *, path="/v1/completions", headers=HEADERS, settings=SERVER, method="POST", cut=0):
    """What an application behind the check sees, or the status and body that answer for it."""
    parts = [body[:cut], body[cut:]] if cut else [body]
    messages = [
        {"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts
    ]
    messages.append({"type": "http.disconnect"})
    seen, sent = {}, []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        first = await receive()
        seen.update(body=first.get("body"), next=(await receive())["type"], asked=of_context.get())

    async def run():
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await RequestCheck(app, lambda scope: settings)(scope, receive, send)

    asyncio.run(run())
    return seen or (sent[0]["status"], json.loads(sent[1]["body"]))


def asking(**xargs):
    return json.dumps({"prompt": "x", "vllm_xargs": xargs}).encode()


@pytest.mark.parametrize("cut", [0, 5])
def test_the_application_reads_the_whole_body_and_then_the_client(cut):
    body = asking(s2o_sparsity_budget=0.4)
    assert serve(body, cut=cut) == {
        "body": body, "next": "http.disconnect", "asked": {"sparsity_budget": 0.4},
    }  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"s2o"', b"3", b'{"vllm_xargs": 3, "s": []}'])
def test_what_is_no_request_is_left_to_vllm(body):
    assert serve(body)["body"] == body


def test_deeply_nested_json_is_left_to_vllm():
    body = b'{"vllm_xargs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert serve(body)["body"] == body


def test_other_bodies_methods_and_servers_pass_by():
    body = asking(s2o_sparsity_budget=0.9)
    assert serve(body, headers=[(b"content-type", b"text/plain")])["body"] == body
    assert serve(body, settings=None)["body"] == body
    assert serve(body, method="GET")["body"] == body


def test_the_operators_cap_holds():
    status, content = serve(asking(s2o_sparsity_budget=0.9))
    assert status == 400
    assert content["error"] == {
        "message": "s2o: s2o_sparsity_budget is 0.9, must be at most 0.5 on this server",
        "type": "BadRequestError", "param": "vllm_xargs", "code": 400,
    }  # fmt: skip


def test_a_refusal_of_messages_is_in_their_form():
    status, content = serve(asking(s2o_sparsity_budget=True), path="/v1/messages")
    assert (status, content["type"]) == (400, "error")
    assert "s2o_sparsity_budget is True" in content["error"]["message"]


def test_a_client_that_leaves_is_no_request():
    async def receive():
        return {"type": "http.disconnect"}

    async def app(*_):
        pytest.fail("served")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": HEADERS}
    asyncio.run(RequestCheck(app, lambda scope: SERVER)(scope, receive, None))


def test_sampling_parameters_in_a_body_are_read():
    body = json.dumps({"sampling_params": {"extra_args": {"s2o_sparsity_budget": 0.9}}}).encode()
    with pytest.raises(ConfigError, match=r"at most 0\.5"):
        settings_in(body, SERVER)


def test_a_prompt_that_speaks_of_us_is_no_setting():
    body = {"prompt": 'vllm_xargs: {"s2o_sparsity_budget": 2}', "vllm_xargs": {"ranking": "x"}}
    assert settings_in(json.dumps(body).encode(), SERVER) == {}


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}])
def test_parameters_that_an_endpoint_made_get_what_the_request_asked_for(extra):
    from vllm.sampling_params import SamplingParams

    config = SimpleNamespace(additional_config={"s2o": SERVER.as_dict()})
    made, seen = SamplingParams(extra_args=extra), []

    def original(self, request_id, prompt, params):
        seen.append(params)
        return SimpleNamespace(cache_salt=None)

    def run():
        of_context.set({"sparsity_budget": 0.4})
        processor = SimpleNamespace(vllm_config=config)
        return request_hooks._process_inputs(original, processor, "id", "prompt", made)

    import contextvars

    request = contextvars.Context().run(run)
    assert "sparsity_budget=0.4," in request.cache_salt
    assert seen[0].extra_args == (extra or {}) | {"s2o_sparsity_budget": 0.4}
    assert made.extra_args == extra, "they may be another request's, too"
