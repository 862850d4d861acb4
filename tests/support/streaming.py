"""A stand-in for a server that streams token ids and has a prefix cache."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

import answering

BLOCK = 16


class Streaming(ThreadingHTTPServer):
    """Answers ``max_tokens`` ids, one an event, and remembers what it was asked.

    Attributes:
        asked: bodies of completions, in the order of arrival.
        tokenizer: it has one: a word's id is its length and first letter.
        fails: tells by a body whether to answer HTTP 500.
        delay_s: before each token.
        most_at_once: completions that ran at the same time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[dict[str, Any]] = []
        self.tokenizer = True
        self.fails = lambda body: False
        self.delay_s = 0.0
        self.longest = 1 << 20
        self.running = self.most_at_once = 0
        self.hits = self.queries = 0
        self.cached: set[tuple[str, tuple[int, ...]]] = set()
        self.lock = threading.Lock()

    def get(self, path: str) -> Any:
        model = {"id": "small", "root": "folder", "max_model_len": self.longest}
        pages = {"/health": "", "/version": {"version": "0.32.0"}, "/v1/models": {"data": [model]}}
        pages["/metrics"] = (
            f"vllm:prefix_cache_hits_total {self.hits}\n"
            f"vllm:prefix_cache_queries_total {self.queries}\n"
        )
        return pages.get(path)

    def count(self, body: dict[str, Any]) -> None:
        """Look a prompt up block by block, as vLLM does, and keep it with its answer."""
        prompt, salt = body["prompt"], body["cache_salt"]
        prefixes = [(salt, tuple(prompt[:end])) for end in range(BLOCK, len(prompt), BLOCK)]
        with self.lock:
            self.asked.append(body)
            self.queries += len(prompt)
            self.hits += BLOCK * sum(prefix in self.cached for prefix in prefixes)
            whole = prompt + answer_to(body)
            for end in range(BLOCK, len(whole), BLOCK):
                self.cached.add((salt, tuple(whole[:end])))


def answer_to(body: dict[str, Any]) -> list[int]:
    return [7 + number for number in range(body["max_tokens"])]


class Handler(answering.Handler):
    server: Streaming  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            words = body["prompt"].split()
            ids = [ord(word[0]) % 64 * 16 + len(word) % 16 for word in words]
            self.answer(200 if self.server.tokenizer else 404, {"tokens": ids})
        elif self.server.fails(body):
            self.answer(500, "out of luck")
        elif body.get("stream"):
            self.stream(body)
        else:  # the question whether a budget is refused
            self.answer(400, "no such budget")

    def stream(self, body: dict[str, Any]) -> None:
        self.server.count(body)
        with self.server.lock:
            self.server.running += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.running)
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for token in answer_to(body):
            time.sleep(self.server.delay_s)
            event = {"choices": [{"text": "", "token_ids": [token]}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        with self.server.lock:
            self.server.running -= 1
        self.close_connection = True


@contextmanager
def streaming() -> Iterator[Streaming]:
    httpd = Streaming()
    threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()
