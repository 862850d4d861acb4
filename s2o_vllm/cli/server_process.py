"""A server as a child process: its start, its pages, its end.

The demonstration, the benchmarks of whole servers and the tests share this module. A server leads
a session of its own, so that an interrupt reaches it only through :func:`stop`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

VISITED = "s2o:history_tokens_visited_total"
ELIGIBLE = "s2o:history_tokens_eligible_total"
START_LIMIT = 900.0  # seconds; the first start downloads and converts the model
STOP_LIMIT = 30.0  # seconds
SETTLE_LIMIT = 8  # seconds for the workers' counters to reach the server's page
REPORT_SECONDS = 10.0  # between two lines that say the server is still loading
LOG_LINES = 25  # of the log, in the message of an error


class ServerError(Exception):
    """A server did not do what was needed of it; the message is for the user."""


def vllm_serve(model: Path | str, port: int, flags: Sequence[str]) -> list[str]:
    """Return the command of `vllm serve` on the loopback interface, in this environment."""
    return [
        sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--port", str(port), "--host", "127.0.0.1", *flags,
    ]  # fmt: skip


def launch(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start a server in a session of its own.

    Args:
        command: the program and its arguments.
        log: file for what the server prints; it is replaced.
        environment: variables beside those of this process.
    """
    variables = os.environ | dict(environment or {})
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=variables
        )


def read(url: str) -> str | None:
    """Return a page of a server, or None while it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return str(page.read().decode("utf-8"))
    except (urllib.error.URLError, OSError):
        return None


def samples(page: str) -> dict[str, float]:
    """Return the samples of a Prometheus page by their name with its labels."""
    pairs = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs if name}


def values(page: str, name: str) -> list[float]:
    """Return the values of a metric in a Prometheus page, one for each set of labels."""
    return [value for key, value in samples(page).items() if key.split("{", 1)[0] == name]


def metric(page: str, name: str) -> float:
    """Return the sum of a counter's samples in a Prometheus page, 0 if it has none."""
    return sum(values(page, name))


def density(before: str, after: str) -> float | None:
    """Return the share of history visited between two Prometheus pages, None if there was none."""
    visited, eligible = (metric(after, name) - metric(before, name) for name in (VISITED, ELIGIBLE))
    return visited / eligible if eligible > 0 else None


def measured_density(url: str, before: str) -> float | None:
    """Return the density since the page ``before``; workers publish counters with a delay."""
    last = page = before
    for _ in range(SETTLE_LIMIT):
        time.sleep(1)
        last, page = page, read(f"{url}/metrics") or ""
        if metric(last, ELIGIBLE) == metric(page, ELIGIBLE) > metric(before, ELIGIBLE):
            break
    return density(before, page)


def wait_until_healthy(
    server: subprocess.Popen, url: str, log: Path, limit: float = START_LIMIT
) -> float:
    """Wait for a server, showing that it is alive; return the seconds it took.

    Args:
        server: the process.
        url: of the server.
        log: what it prints; lines that begin with ``s2o:`` are shown.
        limit: seconds to wait at most.

    Raises:
        ServerError: with the server's last lines, if it ends or takes too long.
    """
    start = reported = time.monotonic()
    shown = 0
    while time.monotonic() - start < limit:
        steps = [line for line in _lines(log) if line.startswith("s2o:")]
        for step in steps[shown:]:
            print(step, flush=True)
        shown = len(steps)
        if server.poll() is not None:
            tail = "\n".join(_lines(log)[-LOG_LINES:])
            raise ServerError(f"{tail}\nThe server ended with exit code {server.returncode}.")
        if read(f"{url}/health") is not None:
            return time.monotonic() - start
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            print(f"s2o: loading, {reported - start:.0f} s so far", flush=True)
        time.sleep(0.5)
    tail = "\n".join(_lines(log)[-LOG_LINES:])
    raise ServerError(f"{tail}\nThe server was not healthy within {limit:.0f} s.")


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def stop(*servers: subprocess.Popen) -> None:
    """End servers and their workers: gently first, at once if late or interrupted again."""
    running = [server for server in servers if server.poll() is None]
    for server in running:
        server.send_signal(signal.SIGINT)
    for server in running:
        try:
            server.wait(STOP_LIMIT)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(server.pid, signal.SIGKILL)  # it leads a session of its own
            server.wait()


@contextmanager
def starting(
    model: Path,
    port: int,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Callable[[], str]]:
    """Start `vllm serve` on this machine; stop it and its workers in the end.

    Yields:
        A function that waits until the server is healthy and returns its URL; several servers
        can start at once.

    Args:
        model: the model's folder.
        port: where it listens, on the loopback interface alone.
        flags: of `vllm serve`.
        log: file for what the server prints.
        environment: variables beside those of this process.

    Raises:
        ServerError: if the port is taken, or the server ends or is not healthy in time.
    """
    url = f"http://127.0.0.1:{port}"
    if read(f"{url}/health") is not None:
        raise ServerError(f"port {port} is taken: choose another with --port")
    with ended_by_sigterm() as from_now_on:
        process = launch(vllm_serve(model, port, flags), log, environment)

        def healthy() -> str:
            wait_until_healthy(process, url, log)
            return url

        try:
            from_now_on()
            yield healthy
        finally:
            stop(process)


@contextmanager
def vllm_server(
    model: Path,
    port: int,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Start `vllm serve`, wait until it is healthy and yield its URL; see :func:`starting`."""
    with starting(model, port, flags, log, environment) as healthy:
        yield healthy()


@contextmanager
def ended_by_sigterm() -> Iterator[Callable[[], None]]:
    """Let SIGTERM unwind this process as an interruption does: its server must not outlive it.

    Yields:
        A function that lets it: a signal that came before is acted on then, so that none falls
        between the start of a server and the code that ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # only the main thread may say what a signal does
        return
    came: list[int] = []
    acting = False

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if acting:
            raise SystemExit(128 + number)

    def from_now_on() -> None:
        nonlocal acting
        acting = True
        if came:
            raise SystemExit(128 + came[0])

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield from_now_on
    finally:
        signal.signal(signal.SIGTERM, before)
