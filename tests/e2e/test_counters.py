"""What becomes of a server's counters, and of the server, where their folder is in trouble."""

import contextlib
import os
import shutil
import subprocess
import time
import urllib.request

import pytest

from asking import ask

pytestmark = pytest.mark.e2e

FLAGS = ("--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-segment-size", "128")
PROMPT = list(range(3, 512)) * 2


def folders(root):
    return [name for name in os.listdir(root) if name.startswith("s2o-metrics-")]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder of a file system that has hardly any space."""
    folder = tmp_path_factory.mktemp("full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def servers(launch, tiny_model, full, ours):
    variables = {"full": {"TMPDIR": str(full)}, "ours": {"TMPDIR": str(ours)}}
    return launch(tiny_model, variables, full=FLAGS, ours=FLAGS)


def test_a_full_temporary_folder_costs_the_counters_alone(servers, full):
    server = servers["full"]
    with contextlib.suppress(OSError), (full / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    ask(server.url, PROMPT, output_tokens=2)
    ask(server.url, PROMPT, output_tokens=2, budget=0.5)
    assert server.log.read_text().count("no counters of S2O on /metrics") == 1
    assert not [name for name in server.metrics() if name.startswith("s2o:")]


def test_counters_outlive_the_removal_of_their_folder(servers, ours):
    server = servers["ours"]
    (name,) = folders(ours)
    shutil.rmtree(ours / name)
    ask(server.url, PROMPT, output_tokens=2)
    deadline = time.monotonic() + 30
    while not server.total("s2o:sparse_requests") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.total("s2o:sparse_requests") > 0
    assert urllib.request.urlopen(server.url + "/health").status == 200


def test_a_server_that_stops_leaves_nothing_behind(servers, ours):
    assert folders(ours)
    servers["ours"].process.terminate()
    servers["ours"].process.wait(60)
    assert folders(ours) == []
