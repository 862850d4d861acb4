"""Real servers: stock `vllm serve` processes, one S2O and one stock, on a tiny random model."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 600
FIRST_PORT = int(os.environ.get("S2O_TEST_PORT", "18311"))
PORTS = iter(range(FIRST_PORT, FIRST_PORT + 90))


@dataclass
class Server:
    url: str
    model: str
    process: subprocess.Popen
    log: Path

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name with labels."""
        with urllib.request.urlopen(self.url + "/metrics") as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def total(self, metric: str) -> float:
        """A counter's value, summed over its labels."""
        name = metric + "_total"
        return sum(value for key, value in self.metrics().items() if key.split("{")[0] == name)


def start_server(folder: Path, name: str, model: str, *flags: str) -> Server:
    port = next(PORTS)
    log = folder / f"{name}.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
        "--port", str(port), "--host", "127.0.0.1", "--load-format", "dummy",
        "--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "512", *flags,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    server = Server(f"http://127.0.0.1:{port}", model, process, log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"server ended:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(server.url + "/health", timeout=2)
            return server
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    process.kill()
    pytest.fail(f"server not ready in {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def stop(server: Server) -> None:
    server.process.terminate()
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.process.kill()


@pytest.fixture(scope="session")
def e2e_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server(e2e_folder, tiny_model):
    """`vllm serve … --attention-backend s2o --s2o-sparsity-budget 0.1`."""
    one = start_server(
        e2e_folder, "s2o", tiny_model,
        "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1", "--s2o-min-context", "256",
        "--s2o-segment-size", "128",
    )  # fmt: skip
    yield one
    stop(one)


@pytest.fixture(scope="session")
def stock_server(e2e_folder, tiny_model):
    """The same server without a word of S2O."""
    one = start_server(e2e_folder, "stock", tiny_model)
    yield one
    stop(one)


@pytest.fixture(scope="module")
def launch(e2e_folder):
    """Start a server by ``launch(name, model, *flags)``; it runs until the next, or the end."""
    started = []

    def start(name, model, *flags):
        while started:
            stop(started.pop())
        started.append(start_server(e2e_folder, name, model, *flags))
        return started[-1]

    yield start
    while started:
        stop(started.pop())
