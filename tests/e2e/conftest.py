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

    def settled(self, counters: tuple[str, ...], changed_from: list[float] | None = None):
        """Counters' values, once the last layer's have arrived.

        They reach /metrics with a delay: those of an earlier request must not count here.
        """
        last = now = None
        deadline = time.monotonic() + 60
        while now is None or now != last or now == changed_from:
            assert time.monotonic() < deadline, "the counters do not settle"
            if now is not None:
                time.sleep(1.5)
            last, now = now, [self.total(name) for name in counters]
        return now


def begin(folder: Path, name: str, model: str, *flags: str, **variables: str) -> Server:
    port = next(PORTS)
    log = folder / f"{name}.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
        "--port", str(port), "--host", "127.0.0.1", "--load-format", "dummy",
        "--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "512", *flags,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= variables
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    return Server(f"http://127.0.0.1:{port}", model, process, log)


def ready(server: Server) -> Server:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"server ended:\n{server.log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(server.url + "/health", timeout=2)
            return server
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    server.process.kill()
    pytest.fail(f"server not ready in {START_SECONDS} s:\n{server.log.read_text()[-4000:]}")


def stop(*servers: Server) -> None:
    for server in servers:
        server.process.terminate()
    for server in servers:
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.fixture(scope="session")
def e2e_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


FLAGS = {
    "server": (
        "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1", "--s2o-min-context", "256",
        "--s2o-segment-size", "128",
    ),
    "stock_server": (),
}  # fmt: skip


@pytest.fixture(scope="session")
def begun(request, e2e_folder, tiny_model):
    """The session's servers, as far as they are needed. A start hardly fills one core."""
    needed = {name for item in request.session.items for name in item.fixturenames}
    servers = {
        name: begin(e2e_folder, name, tiny_model, *flags)
        for name, flags in FLAGS.items()
        if name in needed
    }
    yield servers
    stop(*servers.values())


@pytest.fixture(scope="session")
def server(begun):
    """`vllm serve … --attention-backend s2o --s2o-sparsity-budget 0.1`."""
    return ready(begun["server"])


@pytest.fixture(scope="session")
def stock_server(begun):
    """The same server without a word of S2O."""
    return ready(begun["stock_server"])


@pytest.fixture(scope="module")
def launch(e2e_folder):
    """Start servers side by side: ``launch(model, name=flags, ...)``; they run until the next.

    ``variables`` are environment variables by the server's name.
    """
    started = []

    def start(model, variables=None, **flags):
        stop(*started)
        started.clear()
        ours = {
            name: begin(e2e_folder, name, model, *own, **(variables or {}).get(name, {}))
            for name, own in flags.items()
        }
        started.extend(ours.values())
        return {name: ready(one) for name, one in ours.items()}

    yield start
    stop(*started)
