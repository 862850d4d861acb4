"""Features of vLLM's that need a GPU, each with S2O on. Two servers start side by side, then one.

The card does the same arithmetic on the same shapes, so where a prompt is computed in the same
pieces the tokens must be the same, to the last of them.
"""

import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from asking import ask, grown, post, tracebacks
from models import VOCABULARY
from s2o_vllm.benchmarks.speed.serving import kv_cache_bytes, llama_shape, prompt
from s2o_vllm.cli.server_process import measured_density, metric, read, starting, vllm_server
from s2o_vllm.config import S2OConfig

pytestmark = pytest.mark.e2e

CONTEXT, CHUNK = 32768, 8192
CACHE_TOKENS = 36864  # a little more than one request of the greatest length
LONG, REST, FILLER = 16384, 2048, 30000  # tokens; the first in whole blocks and whole chunks
OFFLOAD_GIB = 2  # holds all that is asked below
S2O = ("--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1")
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # vLLM has /sleep and /wake_up only then
LOCAL_HITS, OTHER_HITS = "vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total"

FULL_CONTEXT = 131072
ANSWER = 128  # tokens: the first prompt's answer lasts until the last prompt is read


def text(seed, length=LONG):
    return prompt(length, seed, VOCABULARY)


@pytest.fixture(scope="module")
def servers(narrow_llama, tmp_path_factory):
    """URLs: `ahead` schedules asynchronously and can sleep, `in_step` does not; it offloads."""
    folder = tmp_path_factory.mktemp("features")
    flags = (
        *S2O, "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(CHUNK),
        "--gpu-memory-utilization", "0.3",
        "--kv-cache-memory-bytes", str(kv_cache_bytes(narrow_llama, CACHE_TOKENS)),
    )  # fmt: skip
    each = {
        "ahead": ("--async-scheduling", "--enable-sleep-mode"),
        "in_step": ("--no-async-scheduling",),
    }
    if has_room_to_offload():
        each["in_step"] += ("--kv-offloading-size", str(OFFLOAD_GIB))
    with ExitStack() as stack:
        begun = {
            name: stack.enter_context(
                starting(
                    narrow_llama, 8473 + number, [*flags, *own], folder / f"{name}.log", DEVELOPMENT
                )
            )
            for number, (name, own) in enumerate(each.items())
        }
        yield {name: healthy() for name, healthy in begun.items()}


def has_room_to_offload():
    return shutil.disk_usage("/dev/shm").free > OFFLOAD_GIB * 2**30


def test_async_scheduling_keeps_the_tokens(servers):
    """The next step is planned before the last one's tokens are known."""
    before = read(servers["ahead"] + "/metrics")
    cases = [(text(1), None, 64), (text(2), 0.05, 64), (text(3), 1.0, 64), (text(4, 500), None, 64)]
    ahead, in_step = ([ask(servers[name], *case) for case in cases] for name in servers)
    assert ahead == in_step
    assert ask(servers["ahead"], text(1), 1.0, 64) != ahead[0], "what is attended to matters"
    assert 0 < measured_density(servers["ahead"], before) < 0.2


def test_after_sleep_a_prompt_has_the_same_answer(servers):
    """Level 1 keeps the weights on the host and drops the KV cache; S2O's workspace stays."""
    url = servers["ahead"]
    before = read(url + "/metrics")
    answer = ask(url, text(5))
    post(url + "/sleep?level=1")
    assert json.loads(read(url + "/is_sleeping")) == {"is_sleeping": True}
    post(url + "/wake_up")
    assert json.loads(read(url + "/is_sleeping")) == {"is_sleeping": False}
    assert ask(url, text(5)) == answer
    assert grown(url, before, LOCAL_HITS) == [0], "it was computed again"
    assert measured_density(url, before) < 0.2


def test_blocks_that_come_back_from_the_host(servers):
    """A history that was evicted and loaded again is ranked as one that never left."""
    if not has_room_to_offload():
        pytest.skip(f"/dev/shm has less than {OFFLOAD_GIB} GiB")
    url, history, rest = servers["in_step"], text(6), text(7, REST)
    ask(url, history, cache_salt="stays")
    before = read(url + "/metrics")
    stayed = ask(url, history + rest, cache_salt="stays")
    assert grown(url, before, LOCAL_HITS, OTHER_HITS) == [LONG, 0]

    ask(url, history, cache_salt="leaves")
    for seed in (8, 9):
        ask(url, text(seed, FILLER), output_tokens=1)
    before = read(url + "/metrics")
    assert ask(url, history + rest, cache_salt="leaves") == stayed
    here, back = grown(url, before, LOCAL_HITS, OTHER_HITS)
    assert back > 0.9 * LONG
    assert here + back == LONG

    before = read(url + "/metrics")
    ask(url, history + rest, 0.25, cache_salt="leaves")
    reused = sum(grown(url, before, LOCAL_HITS, OTHER_HITS))
    assert 0 < reused <= S2OConfig().min_context < LONG, "those alone that no budget touches"


def lengths(tokens):
    """Prompts whose blocks, with those of their answers, fill a cache of that many tokens."""
    whole, last = divmod(tokens, FULL_CONTEXT)
    return [FULL_CONTEXT - ANSWER] * whole + [last - ANSWER] * (last > 2 * ANSWER)


def test_the_cache_full_to_the_last_block(tmp_path):
    """Llama-3.1-8B's shape at vLLM's 0.9 of the card: S2O's workspace is in vLLM's own profile."""
    model, flags = llama_shape(tmp_path)
    flags += [
        *S2O, "--load-format", "dummy", "--max-model-len", str(FULL_CONTEXT),
        "--gpu-memory-utilization", "0.9",
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with vllm_server(model, 8475, flags, log) as url:
        before = read(url + "/metrics")
        blocks, size = (
            int(re.search(rf'vllm:cache_config_info{{.*\b{name}="(\d+)"', before)[1])
            for name in ("num_gpu_blocks", "block_size")
        )
        prompts = [prompt(n, i, 30000) for i, n in enumerate(lengths((blocks - 1) * size))]
        assert len(prompts) > 2
        usage, done = [0.0], threading.Event()

        def watch():
            while not done.wait(0.05):
                usage.append(metric(read(url + "/metrics") or "", "vllm:kv_cache_usage_perc"))

        with ThreadPoolExecutor(len(prompts) + 1) as pool:
            watching = pool.submit(watch)
            answers = []
            for tokens in prompts:
                answers.append(pool.submit(ask, url, tokens, None, ANSWER))
                time.sleep(0.5)  # in this order
            for answer in answers:
                answer.result()
            done.set()
            watching.result()
        assert max(usage) > 0.999, "but for the last blocks of some answers"
        assert grown(url, before, "vllm:num_preemptions_total") == [0]
        assert measured_density(url, before) < 0.12
        assert tracebacks(log) == []
        assert "out of memory" not in log.read_text().lower()
