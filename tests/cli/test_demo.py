import subprocess
import sys

import pytest

from s2o_vllm.cli import demo

PAGE = """\
# HELP s2o:history_tokens_visited_total History tokens that prefill queries visited.
# TYPE s2o:history_tokens_visited_total counter
s2o:history_tokens_visited_total {visited}
s2o:history_tokens_visited_created 99.0
# TYPE s2o:history_tokens_eligible_total counter
s2o:history_tokens_eligible_total{{rank="0"}} {eligible}
s2o:history_tokens_eligible_total{{rank="1 b"}} 1e3
s2o:dense_rows_total{{reason="short history"}} 5.0
"""


def page(visited, eligible):
    return PAGE.format(visited=visited, eligible=eligible)


def test_a_counter_is_the_sum_of_its_samples():
    assert demo.metric(page(250.0, 500.0), demo.VISITED) == 250
    assert demo.metric(page(250.0, 500.0), demo.ELIGIBLE) == 1500
    assert demo.metric(page(250.0, 500.0), "s2o:dense_rows_total") == 5
    assert demo.metric(page(250.0, 500.0), "s2o:dense_rows") == 0
    assert demo.metric("", demo.VISITED) == 0


def test_density_is_what_was_visited_in_between():
    assert demo.density(page(100, 1000), page(350, 2000)) == 0.25
    assert demo.density("", page(350, 400)) == 0.25


def test_no_density_when_nothing_ran_sparse():
    assert demo.density(page(100, 1000), page(100, 1000)) is None


def test_density_waits_for_the_workers(monkeypatch):
    pages = iter([page(0, 0), page(100, 400), page(250, 1000), page(250, 1000), page(9, 9)])
    monkeypatch.setattr(demo, "read", lambda url: next(pages))
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    assert demo.measured_density("http://server", page(0, 0)) == 0.25


def test_the_prompt_hides_one_fact_far_from_the_question():
    prompt = demo.long_prompt()
    assert prompt.count(demo.FACT) == 1
    assert 0.7 < prompt.index(demo.FACT) / len(prompt) < 0.8
    assert prompt.endswith(demo.OPENING)
    assert demo.FACT.startswith(demo.OPENING)
    assert len(prompt.split()) > 4000
    assert prompt == demo.long_prompt()
    sentences = prompt.split("\n")[0].split(". ")
    assert len(set(sentences)) > 0.95 * len(sentences)


def child(code):
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    with pytest.raises(demo.ServerError) as error:
        demo.wait_until_healthy(child("raise SystemExit(3)"), "http://127.0.0.1:9", log)
    lines = str(error.value).splitlines()
    assert lines[0] == "line 75"
    assert lines[-2:] == ["line 99", "The server ended with exit code 3."]


def test_waiting_shows_the_servers_steps(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    log.write_text("s2o: Device: CPU\nINFO noise\ns2o: Starting\n")
    monkeypatch.setattr(demo, "read", lambda url: "")
    server = child("import time; time.sleep(60)")
    try:
        demo.wait_until_healthy(server, "http://server", log)
    finally:
        demo.stop(server)
    assert capsys.readouterr().out == "s2o: Device: CPU\ns2o: Starting\n"
    assert server.poll() is not None


def test_a_server_that_never_becomes_healthy_is_given_up(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("stuck\n")
    monkeypatch.setattr(demo, "START_LIMIT", 0.1)
    server = child("import time; time.sleep(60)")
    try:
        with pytest.raises(demo.ServerError, match="stuck\nThe server was not healthy within"):
            demo.wait_until_healthy(server, "http://127.0.0.1:9", log)
    finally:
        demo.stop(server)


def test_a_server_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(demo, "STOP_LIMIT", 0.5)
    code = (
        "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    server.stdout.readline()
    demo.stop(server)
    assert server.returncode == -9


def test_a_taken_port_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(demo, "read", lambda url: "")
    monkeypatch.setattr(demo, "start", lambda *args: pytest.fail("started a server"))
    assert demo.main(["--port", "8000"]) == 2
    assert "port 8000 is taken" in capsys.readouterr().err


def test_unknown_flags_go_to_the_server(monkeypatch):
    seen = []

    def start(words, port, output):
        seen.append((words, port))
        return child("raise SystemExit(1)")

    monkeypatch.setattr(demo, "read", lambda url: None)
    monkeypatch.setattr(demo, "start", start)
    assert demo.main(["--once", "--port", "8009", "--s2o-sparsity-budget", "0.5"]) == 1
    assert seen == [(["--s2o-sparsity-budget", "0.5"], 8009)]


def test_what_is_reported(monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.setattr(demo, "ask", lambda url, prompt: demo.Answer("7429.", 5000, 1.5, 2.0))
    monkeypatch.setattr(demo, "read", lambda url: "")
    monkeypatch.setattr(demo, "measured_density", lambda url, before: 0.2501)
    demo.report("http://server")
    text = capsys.readouterr().out
    assert "Answer:              The magic number of the lighthouse is 7429.\n" in text
    assert "Prompt:              5,000 tokens\n" in text
    assert "Time to first token: 1.50 s\n" in text
    assert "Density:             0.250 " in text
