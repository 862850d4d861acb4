"""Real servers: stock `vllm serve` processes, one S2O and one stock, on a tiny random model."""

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from s2o_vllm.cli import server_process
from s2o_vllm.cli.server_process import ServerError, wait_until_healthy

START_SECONDS = 600.0  # less than a test's own limit
FIRST_PORT = int(os.environ.get("S2O_TEST_PORT", "18311"))
PORTS = iter(range(FIRST_PORT, FIRST_PORT + 90))


@dataclass
class Server:
    url: str
    model: str
    process: subprocess.Popen
    log: Path

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name with labels; S2O's without those that all of them have."""
        shared = ('engine="0"', f'model_name="{self.model}"')

        def name(match: re.Match) -> str:
            kept = [label for label in match[2].split(",") if label not in shared]
            return match[1] + (f"{{{','.join(kept)}}}" if kept else "")

        return server_process.samples(
            re.sub(r"^(s2o:\w+)\{([^}]*)\}", name, self.page(), flags=re.M)
        )

    def page(self) -> str:
        page = server_process.read(self.url + "/metrics")
        assert page is not None, f"{self.url} does not answer"
        return page

    def total(self, metric: str) -> float:
        """A counter's value, summed over its labels."""
        return server_process.metric(self.page(), metric + "_total")

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
    own = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "4096",
           "--max-num-batched-tokens", "512")  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"} | variables
    command = server_process.vllm_serve(model, port, [*own, *flags])
    process = server_process.launch(command, log, environment)
    return Server(f"http://127.0.0.1:{port}", model, process, log)


def ready(server: Server) -> Server:
    """Wait until a server answers; end it where it does not."""
    try:
        wait_until_healthy(server.process, server.url, server.log, START_SECONDS)
    except ServerError:
        stop(server)
        raise
    return server


def stop(*servers: Server) -> None:
    server_process.stop(*(server.process for server in servers))


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
