"""A stand-in for vLLM's OpenAI-compatible server: it answers by a function, and remembers."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], Any]


class Refusal(Exception):
    """Raised by a reply function: HTTP 400 with a message; without one, no answer at all."""


class Answering(ThreadingHTTPServer):
    """Answers completions with ``reply(body)``: a text, or a choice's fields.

    Attributes:
        asked: bodies of completions, those that only ask for a budget aside.
        sparse: it knows S2O's budgets; else it ignores them.
        largest: budgets above are refused.
        counters: S2O's visited and eligible tokens; a sparse question adds 10 and 100.
    """

    daemon_threads = True

    def __init__(self, reply: Reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.sparse = True
        self.largest = 1.0
        self.counters: list[int] | None = None
        self.lock = threading.Lock()

    def get(self, path: str) -> Any:
        if path == "/metrics" and self.counters:
            names = ("visited", "eligible")
            lines = zip(names, self.counters, strict=True)
            return "".join(f"s2o:history_tokens_{name}_total {n}\n" for name, n in lines)
        model = {"id": "small", "root": "folder", "max_model_len": 512}
        pages = {"/health": "", "/version": {"version": "0.32.0"}, "/v1/models": {"data": [model]}}
        return pages.get(path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/tokenize":
            assert body["add_special_tokens"] is False
            return {"tokens": [int(word) for word in body["prompt"].split()]}
        budget = body["vllm_xargs"]["s2o_sparsity_budget"]
        if self.sparse and budget > self.largest:
            raise Refusal(f"s2o: s2o_sparsity_budget is {budget}, must be at most {self.largest}")
        if body["prompt"] == "1":
            return {"choices": [{"text": ""}]}
        with self.lock:
            self.asked.append(body)
        choice = self.reply(body)
        if budget < 1:
            with self.lock:
                visited, eligible = self.counters or [0, 0]
                self.counters = [visited + 10, eligible + 100]
        choice = {"text": choice} if isinstance(choice, str) else choice
        choice = {"index": 0, "text": "", "finish_reason": "stop", "logprobs": None} | choice
        return {
            "id": "1", "object": "text_completion", "created": 1, "model": "small",
            "choices": [choice],
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Answering

    def answer(self, status: int, page: Any) -> None:
        text = (page if isinstance(page, str) else json.dumps(page)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        page = self.server.get(self.path)
        self.answer(404 if page is None else 200, "" if page is None else page)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self.answer(200, self.server.post(self.path, body))
        except Refusal as refusal:
            if refusal.args:
                self.answer(400, {"error": {"message": str(refusal)}})
            else:
                self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def answering(reply: Reply):
    httpd = Answering(reply)
    threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()
