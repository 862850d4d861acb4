"""Faults of a live server: clients that leave, a full cache, signals, an engine that is killed.

Nobody else's answer changes, errors have OpenAI's shape, nothing of ours stays behind.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException

import pytest
from safetensors.torch import load_file, save_file

from asking import ask as ask_freely
from asking import tracebacks
from models import write_model, write_weights
from s2o_vllm.cli.probe import probe

pytestmark = pytest.mark.e2e

S2O = ("--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-segment-size", "128",
       "--load-format", "safetensors", "--dtype", "float32")  # fmt: skip
SMALL_CACHE = ("--num-gpu-blocks-override", "24", "--block-size", "128", "--max-model-len", "2900")
GONE_SECONDS = 60


BROKEN = 5  # a token whose embedding is no number: so are keys and queries from there on


# Answers must not hold it: on a CPU stock vLLM's attention multiplies what lies behind a sequence
# in its last block by zero; NaN that an earlier request left there is NaN in the next's answer.
WITHOUT_IT = {"logit_bias": {str(BROKEN): -100}}


def ask(*given, **extra):
    return ask_freely(*given, **WITHOUT_IT, **extra)


def prompt(seed, length=1500):
    choose = random.Random(seed).randrange
    return [choose(BROKEN + 1, 512) for _ in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder, tie_word_embeddings=False)
    write_weights(folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    embedding[BROKEN] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


NAMES = ("small", "patient", "killed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The servers' own temporary folders."""
    return {name: tmp_path_factory.mktemp(name) for name in NAMES}


@pytest.fixture(scope="module")
def servers(launch, model, folders):
    variables = {name: {"TMPDIR": str(folder)} for name, folder in folders.items()}
    patient = (*S2O, "--shutdown-timeout", "60")
    return launch(model, variables, small=S2O + SMALL_CACHE, patient=patient, killed=S2O)


def left_behind(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("s2o"))


def children(pid):
    """All processes below one, by name."""
    found = {}
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    below = {pid}
    for _ in rows:
        new = {int(one) for one, parent, _ in rows if int(parent) in below} - below
        if not new:
            break
        below |= new
    for one, _, name in rows:
        if int(one) in below - {pid}:
            found[int(one)] = name
    return found


def alive(pids):
    """Those of some processes that still run; a zombie does not."""
    states = {}
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            states[pid] = file.read().rpartition(")")[2].split()[0]
    return [pid for pid, state in states.items() if state != "Z"]


def wait_until(condition, seconds=GONE_SECONDS, every=0.2):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def gone(server, pids, folder):
    """Assert that a server and all its processes end, and leave nothing of ours."""
    server.process.wait(GONE_SECONDS)
    assert wait_until(lambda: not alive(pids)), children(1)
    assert wait_until(lambda: left_behind(folder) == [], 5), left_behind(folder)


def leave(server, tokens, pieces, wait=0.0, budget=0.1):
    """Ask for a long streamed answer, read some pieces of it, and hang up."""
    body = {
        "model": server.model, "prompt": tokens, "max_tokens": 400, "stream": True,
        "ignore_eos": True, "vllm_xargs": {"s2o_sparsity_budget": budget}, **WITHOUT_IT,
    }  # fmt: skip
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    if pieces:
        answer = connection.getresponse()
        assert answer.status == 200
        for _ in range(pieces):
            while not answer.readline().startswith(b"data: {"):
                pass
    time.sleep(wait)
    connection.close()


def idle(server):
    page = server.metrics()
    held = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return not any(value for key, value in page.items() if key.split("{")[0] in held)


def answers(server, salt):
    """Of one prompt by budget; a salt keeps them from each other's blocks."""
    return {
        budget: ask(server.url, prompt(1), budget, 24, cache_salt=salt) for budget in (1.0, 0.1)
    }


def test_clients_that_leave_change_nobodys_answer(servers):
    server = servers["killed"]
    alone = answers(server, "before")
    assert alone[1.0] != alone[0.1], "what is attended to matters"
    with ThreadPoolExecutor(8) as pool:
        stays = pool.submit(ask, server.url, prompt(1), 1.0, 24, cache_salt="during")
        leaves = [
            pool.submit(leave, server, prompt(10 + number, 3500), pieces, wait, budget)
            for number, (pieces, wait, budget) in enumerate(
                [(0, 0.0, 0.1), (0, 0.3, 0.1), (0, 0.3, 1.0), (1, 0.0, 0.1), (5, 0.0, 1.0)]
            )
        ]
        for one in leaves:
            one.result()
        assert stays.result() == alone[1.0]
    assert wait_until(lambda: idle(server)), "what was left is still held"
    assert answers(server, "after") == alone
    assert tracebacks(server.log) == []


@pytest.mark.parametrize("at", [3, 1490])
def test_a_prompt_that_overflows_is_nobody_elses(servers, at):
    """Stock vLLM answers nonsense and lives."""
    server = servers["killed"]
    alone = ask(server.url, prompt(2), 1.0, 24, cache_salt=f"alone {at}")
    broken = prompt(3)
    broken[at] = BROKEN
    with ThreadPoolExecutor(4) as pool:
        stays = pool.submit(ask, server.url, prompt(2), 1.0, 24, cache_salt=f"beside {at}")
        answers = [pool.submit(raw, server, broken, 4, budget) for budget in (0.1, 0.5, 1.0)]
        assert all(one.result() is not None for one in answers)
        assert stays.result() == alone
    assert server.process.poll() is None
    assert ask(server.url, prompt(2), 1.0, 24, cache_salt=f"after {at}") == alone
    assert tracebacks(server.log) == []


def test_a_worker_that_stands_still_goes_on_where_it_was(servers):
    server = servers["killed"]
    alone = ask(server.url, prompt(4), 0.1, 1500, cache_salt="alone")
    (worker,) = [pid for pid, name in children(server.process.pid).items() if "Worker" in name]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server.url, prompt(4), 0.1, 1500, cache_salt="stopped")
        # It takes two seconds, in most of which the server answers no other page.
        assert wait_until(lambda: not idle(server), every=0.01)
        os.kill(worker, signal.SIGSTOP)
        time.sleep(3)
        assert not asked.done()
        with urllib.request.urlopen(server.url + "/health") as page:
            assert page.status == 200, "vLLM's page does not see it"
        assert "timed out" in probe(server.url, 2.0)
        os.kill(worker, signal.SIGCONT)
        assert asked.result() == alone
    assert probe(server.url, 60.0) is None


def test_requests_that_lose_their_blocks_to_others_are_answered_alike(servers):
    """Any two prompts fit into the cache's 2,944 tokens, with their answers they do not."""
    server = servers["small"]
    cases = [(prompt(20 + number, 1100), budget) for number in range(2) for budget in (1.0, 0.1)]
    alone = [ask(server.url, *case, 500, cache_salt="alone") for case in cases]
    before = server.total("vllm:num_preemptions")
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(server.url, *case, 500), cases))
    assert server.total("vllm:num_preemptions") > before, "the case must preempt"
    for (_, budget), one, other in zip(cases, together, alone, strict=True):
        assert len(one.tokens) == 500
        assert budget < 1 or one == other, "a dense request's answer is its own"
    assert wait_until(lambda: idle(server))
    assert tracebacks(server.log) == []


def loaded(server, pool, output_tokens, count=3, patience=120):
    """Requests that a server is working on."""
    asked = [
        pool.submit(raw, server, prompt(40 + number, 1500), output_tokens, 0.1, patience)
        for number in range(count)
    ]
    assert wait_until(lambda: server.metrics() and not idle(server))
    return asked


def raw(server, tokens, output_tokens, budget, patience=120):
    """Status and body of an answer, or None where the connection broke or there was none."""
    body = {
        "model": server.model, "prompt": tokens, "max_tokens": output_tokens, "ignore_eos": True,
        "vllm_xargs": {"s2o_sparsity_budget": budget}, **WITHOUT_IT,
    }  # fmt: skip
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=patience) as page:
            return page.status, json.load(page)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except (OSError, HTTPException):
        return None


def finish(answer):
    return answer[1]["choices"][0]["finish_reason"]


ENDS = ("abort", "length")


def test_a_server_told_to_end_under_load_ends(servers, folders):
    """Once its clients have left: vLLM may kill the engine before that says what it gave up."""
    server, folder = servers["small"], folders["small"]
    pids = children(server.process.pid)
    assert left_behind(folder), "the counters' folder"
    with ThreadPoolExecutor(3) as pool:
        asked = loaded(server, pool, 1300, patience=20)
        server.process.send_signal(signal.SIGTERM)
        gone(server, pids, folder)
        told = [one.result() for one in asked]
    for answer in told:  # a broken connection, what was said so far or in time, or an error
        assert answer is None or "error" in answer[1] or finish(answer) in ENDS, answer


def test_a_server_with_patience_answers_before_it_ends(servers, folders):
    server, folder = servers["patient"], folders["patient"]
    pids = children(server.process.pid)
    with ThreadPoolExecutor(3) as pool:
        asked = loaded(server, pool, 2500)
        server.process.send_signal(signal.SIGTERM)
        assert not any(one.done() for one in asked), "they must still be under way"
        answers = [one.result() for one in asked]
        gone(server, pids, folder)
    assert [answer and answer[0] for answer in answers] == [200] * len(asked)
    assert all(one["usage"]["completion_tokens"] == 2500 for _, one in answers)


def test_an_engine_that_is_killed_leaves_errors_of_openais_shape_and_nothing_else(
    servers, folders, launch, model
):
    server, folder = servers["killed"], folders["killed"]
    pids = children(server.process.pid)
    (engine,) = [pid for pid, name in pids.items() if "EngineCore" in name]
    with ThreadPoolExecutor(3) as pool:
        asked = loaded(server, pool, 2500)
        os.kill(engine, signal.SIGKILL)
        answers = [one.result() for one in asked]
        gone(server, pids, folder)
    seen = [answer for answer in answers if answer is not None]
    assert seen, "some answers must arrive before the server ends"
    for status, body in seen:
        assert status == 500
        assert body["error"]["code"] == 500
        assert body["error"]["message"]
    variables = {"again": {"TMPDIR": str(folder)}}
    again = launch(model, variables, again=S2O)["again"]
    assert ask(again.url, prompt(1), 0.1, 4).tokens
    assert len(left_behind(folder)) == 1
