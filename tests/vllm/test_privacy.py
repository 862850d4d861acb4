"""What nobody else may see or reach: prompts, other tenants' blocks, bodies without a key."""

import ast
import asyncio
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import s2o_vllm
from s2o_vllm import request_hooks
from s2o_vllm.config import ConfigError, S2OConfig
from s2o_vllm.http_check import settings_in
from s2o_vllm.requests import cache_salt

ROOT = Path(s2o_vllm.__file__).parent
SERVER = S2OConfig(sparsity_budget=0.2, max_request_budget=0.5)
SAYING = {"print", "warn", "debug", "info", "warning", "error", "exception", "critical", "log"}

# All that the plug-in says in a process of vLLM's; none of it knows a request.
SAID = {
    ("plugin.py", 'print(f"{vllm_command(sys.argv)}: error: {reason}", file=sys.stderr)'),
    ("plugin.py", 'logger.warning("%s", reason)'),
    ("compat.py", 'print(f"{command}: error: {error}", file=sys.stderr)'),
    ("metrics.py", 'logger.warning("s2o: no counters of S2O on /metrics: %s", error)'),
    ("metrics.py", "warn(error)"),
    # Settings and versions; the name of a reason and its fixed meaning.
    ("metadata.py", "logger.warning(uncounted)"),
    ("metadata.py", 'logger.info("S2O on: %s (s2o-vllm %s)", words, __version__)'),
    ("metadata.py", 'logger.info("%s", self_test.run(self.device))'),
    (
        "metrics.py",
        'logger.info("S2O: first chunk on the stock path for %s: %s", reason, meaning)',
    ),
    (
        "worker_hooks.py",
        "logger.warning('S2O: %d layers have compiled no kernel: their first sparse "
        "request will wait for it', len(cold))",
    ),
    (
        "worker_hooks.py",
        "logger.warning('S2O: kernel %s was compiled after the server was ready', kernel)",
    ),
    (
        "forward.py",
        "logger.warning(\"S2O: kernels were compiled without Triton's cache, which cannot "
        'be written (%s): every start compiles them again", refused)',
    ),
    # Means over many queries, of nobody's in particular.
    (
        "shadow.py",
        "logger.warning('S2O: sparse attention differs from dense by %.3f in the mean of the last "
        "%d sampled queries, more than shadow_limit %g: all prefill stays dense until the server "
        "is restarted', mean, rows, limit)",
    ),
}


def said(folder):
    """Calls that print or log, but for those of our own commands."""
    found = set()
    for path in folder.rglob("*.py"):
        if path.is_relative_to(ROOT / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = ast.unparse(getattr(node.func, "value", ast.Constant("")))
            torch = owner in ("torch", "tl", "math")
            if name in SAYING and not torch:
                found.add((path.name, ast.unparse(node)))
    return found


def test_the_plug_in_logs_nothing_of_a_request():
    expected = {(file, ast.unparse(ast.parse(text))) for file, text in SAID}
    assert said(ROOT) == expected


def test_kernels_say_nothing():
    import s2o_vllm.kernels

    calls = {
        (file, text)
        for file, text in said(Path(s2o_vllm.kernels.__path__[0]))
        if not text.endswith((".log()", ".log2()")) and "tl.log" not in text
    }
    assert calls == set()


MARK = "quokka-7431"


@given(
    xargs=st.dictionaries(
        st.sampled_from(["s2o_sparsity_budget", "s2o_target_error", "s2o_budget", "target_error"]),
        st.floats() | st.text(max_size=5) | st.none() | st.booleans(),
        min_size=1,
    ),
    place=st.sampled_from(["vllm_xargs", "extra_body", None]),
)
@example(xargs={"s2o_sparsity_budget": 2}, place="vllm_xargs")
@example(xargs={"s2o_sparsity_budget": 2}, place=None)
def test_no_refusal_repeats_a_prompt(xargs, place):
    body = {"prompt": MARK, "messages": [{"content": MARK}], "suffix": MARK, "user": MARK}
    body |= {place: xargs | {"other": MARK}} if place else xargs
    try:
        settings_in(json.dumps(body).encode(), SERVER)
    except ConfigError as error:
        said = str(error)
        assert MARK not in said


salts = st.none() | st.text(max_size=12) | st.sampled_from(["|s2o:dense", "a|s2o:", "|"])
asked = st.fixed_dictionaries(
    {}, optional={"sparsity_budget": st.floats(0.01, 1), "target_error": st.floats(0, 0.5)}
)


@given(salts=st.tuples(salts, salts), asked=st.tuples(asked, asked))
@example(salts=("a|s2o:dense", "a"), asked=({"sparsity_budget": 1.0}, {"sparsity_budget": 1.0}))
@example(salts=("|s2o:dense", None), asked=({}, {"sparsity_budget": 1.0}))
def test_no_salt_of_one_tenant_is_anothers_or_another_budgets(salts, asked):
    """Whoever may name a salt cannot name one that reaches what he could not reach without us."""
    one, other = (cache_salt(salt, SERVER, of) for salt, of in zip(salts, asked, strict=True))
    if (salts[0] or "") != (salts[1] or ""):
        assert one != other
        return
    settings = [SERVER.as_dict() | of for of in asked]
    dense = [of["sparsity_budget"] == 1 for of in settings]
    assert (one == other) == (all(dense) or settings[0] == settings[1])


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong", 401), ("right", 400)])
def test_a_body_without_the_key_is_not_read(key, status):
    """vLLM asks for its key before anything of ours looks at a request."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()
    app.state.vllm_config = SimpleNamespace(additional_config={"s2o": SERVER.as_dict()})
    args = Namespace(
        allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"],
        allowed_headers=["*"], api_key=["right"], enable_request_id_headers=False, middleware=[],
    )  # fmt: skip
    request_hooks._init_middleware(init_entrypoints_middleware, args, app, ())
    headers = [(b"content-type", b"application/json")]
    if key:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    body, sent, read = b'{"vllm_xargs": {"s2o_sparsity_budget": 2}}', [], []

    async def receive():
        read.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "",
        "query_string": b"", "headers": headers, "client": ("::1", 1), "server": ("::1", 2),
        "scheme": "http",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == status
    assert bool(read) == (status == 400)
