"""`s2o probe` against a stand-in server: alive, busy, standing still, gone."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s2o_vllm.cli.probe import main, probe

KEY = "secret"


class Handler(BaseHTTPRequestHandler):
    """Answers after ``server.delay_s``; its counter of steps moves if ``server.moves``."""

    def reply(self, status, page):
        text = page.encode() if isinstance(page, str) else json.dumps(page).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.server.steps += self.server.moves
        if self.path == "/metrics":
            self.reply(200, f"vllm:iteration_tokens_total_count {self.server.steps}\n")
        else:
            self.reply(200, {"data": [{"id": "small"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers["Authorization"]))
        time.sleep(self.server.delay_s)
        with contextlib.suppress(OSError):  # where the other side did not wait
            self.reply(self.server.status, {"choices": [{"text": "x"}]})

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.steps, httpd.moves, httpd.delay_s, httpd.status, httpd.asked = 0, 0, 0.0, 200, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_a_server_that_gives_a_token_works(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert main(["--url", server.url + "/"]) == 0
    ((body, authorization),) = server.asked
    assert (body["model"], body["max_tokens"]) == ("small", 1)
    assert authorization == f"Bearer {KEY}"


def test_a_busy_server_works_if_its_counters_move(server):
    server.delay_s = 3.0
    server.moves = 1
    assert probe(server.url, 1.0) is None


def test_a_server_whose_worker_stands_still_does_not(server, capsys):
    server.delay_s = 3.0
    assert main(["--url", server.url, "--timeout", "1"]) == 1
    message = capsys.readouterr().err
    assert "gives no token" in message
    assert "timed out" in message
    assert message.count("\n") == 1


def test_an_error_is_no_busy_server(server):
    server.status, server.moves = 500, 1
    assert "500" in probe(server.url, 5.0)


def test_a_server_that_is_gone_does_not_work():
    assert "refused" in probe("http://127.0.0.1:9", 1.0)


def test_a_timeout_that_cannot_work_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--timeout", "0"])
    assert "must be at least 1" in capsys.readouterr().err
