import subprocess
import sys
import time

import psutil
import pytest

from s2o_vllm.cli import server_process

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
    assert server_process.metric(page(250.0, 500.0), server_process.VISITED) == 250
    assert server_process.metric(page(250.0, 500.0), server_process.ELIGIBLE) == 1500
    assert server_process.metric(page(250.0, 500.0), "s2o:dense_rows_total") == 5
    assert server_process.metric(page(250.0, 500.0), "s2o:dense_rows") == 0
    assert server_process.metric("", server_process.VISITED) == 0


def test_density_is_what_was_visited_in_between():
    assert server_process.density(page(100, 1000), page(350, 2000)) == 0.25
    assert server_process.density("", page(350, 400)) == 0.25


def test_no_density_when_nothing_ran_sparse():
    assert server_process.density(page(100, 1000), page(100, 1000)) is None


def test_density_waits_for_the_workers(monkeypatch):
    pages = iter([page(0, 0), page(100, 400), page(250, 1000), page(250, 1000), page(9, 9)])
    monkeypatch.setattr(server_process, "read", lambda url: next(pages))
    monkeypatch.setattr(server_process.time, "sleep", lambda seconds: None)
    assert server_process.measured_density("http://server", page(0, 0)) == 0.25


def child(code):
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    with pytest.raises(server_process.ServerError) as error:
        server_process.wait_until_healthy(child("raise SystemExit(3)"), "http://127.0.0.1:9", log)
    lines = str(error.value).splitlines()
    assert lines[0] == "line 75"
    assert lines[-2:] == ["line 99", "The server ended with exit code 3."]


def test_waiting_shows_the_servers_steps(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    log.write_text("s2o: Device: CPU\nINFO noise\ns2o: Starting\n")
    monkeypatch.setattr(server_process, "read", lambda url: "")
    server = child("import time; time.sleep(60)")
    try:
        server_process.wait_until_healthy(server, "http://server", log)
    finally:
        server_process.stop(server)
    assert capsys.readouterr().out == "s2o: Device: CPU\ns2o: Starting\n"
    assert server.poll() is not None


def test_a_server_that_never_becomes_healthy_is_given_up(tmp_path):
    log = tmp_path / "log"
    log.write_text("stuck\n")
    server = child("import time; time.sleep(60)")
    try:
        with pytest.raises(
            server_process.ServerError, match="stuck\nThe server was not healthy within"
        ):
            server_process.wait_until_healthy(server, "http://127.0.0.1:9", log, limit=0.1)
    finally:
        server_process.stop(server)


def test_a_server_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(server_process, "STOP_LIMIT", 0.5)
    code = (
        "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    server.stdout.readline()
    server_process.stop(server)
    assert server.returncode == -9


def test_servers_are_ended_side_by_side(monkeypatch):
    monkeypatch.setattr(server_process, "STOP_LIMIT", 20)
    slow = "import signal, time; signal.signal(2, lambda *_: (time.sleep(1), exit(0)));"
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", f"{slow} print(flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE, start_new_session=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for server in servers:
        server.stdout.readline()
    began = time.monotonic()
    server_process.stop(*servers)
    assert [server.returncode for server in servers] == [0, 0, 0]
    assert time.monotonic() - began < 2.5, "one after the other would take three seconds"


def test_a_taken_port_starts_no_server(monkeypatch, tmp_path):
    monkeypatch.setattr(server_process, "read", lambda url: "")
    monkeypatch.setattr(server_process, "launch", lambda *args: pytest.fail("started a server"))
    with (
        pytest.raises(server_process.ServerError, match="port 8000 is taken"),
        server_process.starting(tmp_path, 8000, [], tmp_path / "log"),
    ):
        pass


BENCHMARK = """
import sys, time
from pathlib import Path
from s2o_vllm.cli import server_process

with server_process.starting(Path(sys.argv[1]), 18499, [], Path(sys.argv[1]) / "log"):
    time.sleep(100)
"""


def test_a_benchmark_that_is_told_to_end_takes_its_server_with_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not (servers := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline, "no server was started"
        time.sleep(0.1)
    process.terminate()
    code = process.wait(60)
    _, alive = psutil.wait_procs(servers, timeout=10)
    for server in alive:
        server.kill()
    assert (code, alive) == (143, [])
