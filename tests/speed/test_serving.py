import subprocess
import sys
import time

import psutil

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
