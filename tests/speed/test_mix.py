import json
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s2o_vllm.benchmarks.speed import mix

BUDGETS = [0.1, 0.3, 1.0]


def mixed(count=200, lengths=(1024, 131072), seed=0, **options):
    shares = {"hits": 0.2, "aborts": 0.1} | options
    return mix.plan(count, lengths, BUDGETS, seed=seed, **shares)


@pytest.mark.parametrize("seed", range(5))
def test_the_shares_are_exact_and_every_prefix_can_be_shared(seed):
    requests = mixed(seed=seed)
    hits = [one for one in requests if one.prefix_of is not None]
    aborted = [one for one in requests if one.give_up is not None]
    assert (len(hits), len(aborted)) == (40, 20)
    assert {one.give_up for one in aborted} == {0, mix.GIVE_UP_AFTER}
    assert [one.number for one in requests] == list(range(200))
    assert all(1024 <= one.length <= 131072 for one in requests)
    assert {one.budget for one in requests} == set(BUDGETS)
    for one in hits:
        other = requests[one.prefix_of]
        assert other.number < one.number, "sent before"
        assert other.give_up is None, "and to its end"
        assert other.budget == one.budget, "blocks of another budget are not reused"
        assert 0 < one.shared <= min(other.length, one.length - 1)
        assert one.give_up is None


def test_lengths_are_as_often_short_as_long():
    lengths = [one.length for one in mixed(2000)]
    assert 9_000 < statistics.median(lengths) < 15_000, "the middle of 1K and 128K is 11.6K"


def test_a_seed_gives_one_mix():
    assert mixed(seed=3) == mixed(seed=3) != mixed(seed=4)


def test_refuses_shares_that_leave_no_whole_request():
    with pytest.raises(ValueError, match="2 requests cannot hold 1 hits, 1 aborts"):
        mixed(2, hits=0.4, aborts=0.4)


def test_prompts_share_what_is_planned_and_no_more():
    requests = mixed(40, lengths=(64, 512))
    prompts = [mix.tokens_of(one, requests, 7, 30000) for one in requests]
    assert [len(tokens) for tokens in prompts] == [one.length for one in requests]
    for one, tokens in zip(requests, prompts, strict=True):
        if one.prefix_of is not None:
            other = prompts[one.prefix_of]
            assert tokens[: one.shared] == other[: one.shared]
            assert tokens[one.shared :][:20] != other[one.shared :][:20]
    assert len({tuple(tokens[:16]) for tokens in prompts}) == 40 - 8, "all others differ"


class Handler(BaseHTTPRequestHandler):
    """Streams 8 tokens; refuses prompts of 13 tokens and ends those of 14 early."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        if len(body["prompt"]) == 13:
            return self.send_error(400)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = 3 if len(body["prompt"]) == 14 else body["max_tokens"]
        try:
            for token in range(count):
                choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": None}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                self.wfile.flush()
                if not self.server.free.wait(0 if token < mix.GIVE_UP_AFTER else 30):
                    continue
            if len(body["prompt"]) != 15:
                self.wfile.write(b"data: [DONE]\n\n")
            self.server.ended.append(len(body["prompt"]))
        except OSError:
            self.server.left.append(len(body["prompt"]))
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.ended, server.left = [], [], []
    server.free = threading.Event()
    server.free.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(stub):
    return mix.Client(f"http://127.0.0.1:{stub.server_port}", "tiny", 512, 8, "salt", 0)


def test_an_answer_in_full(stub):
    outcome = client(stub).send([5, 6], 0.3)
    assert (outcome.tokens, outcome.error, len(outcome.gaps_s)) == (8, None, 7)
    assert outcome.ttft_s > 0
    (body,) = stub.seen
    assert body["vllm_xargs"] == {"s2o_sparsity_budget": 0.3}
    assert (body["cache_salt"], body["ignore_eos"], body["temperature"]) == ("salt", True, 0)


@pytest.mark.parametrize(
    ("length", "error"), [(13, "BadRequestError"), (14, "asked for 8 tokens and got 3")]
)
def test_what_counts_as_failed(stub, length, error):
    assert error in client(stub).send([5] * length, 0.3).error


def test_no_server_counts_as_failed():
    assert (
        "APIConnectionError"
        in mix.Client("http://127.0.0.1:9", "m", 9, 8, "", 0).send([5], 1).error
    )


@pytest.mark.parametrize("give_up", [0, mix.GIVE_UP_AFTER])
def test_giving_up_leaves_before_the_end(stub, give_up):
    stub.free.clear()  # the stub holds its third token until it is released
    outcome = client(stub).send([5, 6], 0.3, give_up)
    assert (outcome.tokens, outcome.error) == (give_up, None)
    stub.free.set()
    deadline = time.monotonic() + 10
    while not (stub.left or stub.ended) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (stub.left, stub.ended) == ([2], []), "the server met a closed connection"


def test_a_shared_prefix_waits_for_its_first_owner(stub):
    requests = [
        mix.Request(0, 40, 0.1),
        mix.Request(1, 60, 0.1, prefix_of=0, shared=40),
        mix.Request(2, 50, 0.1),
    ]
    stub.free.clear()
    threading.Timer(0.5, stub.free.set).start()
    outcomes = mix.run(client(stub), requests, concurrency=3)
    assert [one.error for one in outcomes] == [None] * 3
    order = [len(body["prompt"]) for body in stub.seen]
    assert sorted(order[:2]) == [40, 50], "the other two are sent at once"
    assert order[2] == 60
