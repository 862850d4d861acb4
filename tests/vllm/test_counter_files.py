"""The files of the counters: space, abandoned folders, folders that others remove."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from s2o_vllm import counter_files, metrics
from s2o_vllm.counter_files import RESERVED, Collector, CounterFile, CounterFolder
from s2o_vllm.kernels.layout import NUM_COUNTERS


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The system's folder of temporary files."""
    monkeypatch.setattr(counter_files.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_space():
    """No file may have more than 4 KiB, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def page(folder):
    """A function that returns the page of metrics."""
    registry = CollectorRegistry()
    Collector(registry, folder)
    return lambda: generate_latest(registry).decode()


def test_a_file_takes_its_space_when_it_is_made(tmp_path):
    file = CounterFile(tmp_path)
    assert os.stat(file.path).st_blocks * 512 >= RESERVED
    assert os.listdir(tmp_path) == [file.path.name]


def test_the_space_is_enough_for_a_model_of_a_thousand_layers(tmp_path):
    worker = metrics.WorkerCounters(str(tmp_path))
    for layer in range(1000):
        worker.watch(torch.ones(NUM_COUNTERS, dtype=torch.int64), layer)
    worker.start()
    worker.publish()
    assert os.stat(worker._file.path).st_size == RESERVED, "it has not grown"


def test_without_space_there_is_one_warning_and_no_counters(tmp_path, no_space, caplog):
    worker = metrics.WorkerCounters(str(tmp_path))
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        for _ in range(3):
            worker.start()
            worker.add("s2o:sparse_requests", 1)
            worker.publish()
    assert len(caplog.records) == 1
    assert "no counters of S2O on /metrics: " in caplog.text
    assert os.listdir(tmp_path) == [], "nothing is left behind"
    assert worker.totals()["s2o:sparse_requests", ""] == 3


def test_without_a_place_for_the_folder_there_is_one_warning(monkeypatch, caplog):
    def refuse(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(counter_files.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(metrics, "_own_folder", None)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(metrics.DIRECTORY, "/of/a/parent/process")
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        metrics.install_collector()
    assert "No usable temporary directory" in caplog.text
    assert metrics.DIRECTORY not in os.environ


def test_counters_come_back_after_the_folder_was_removed(root):
    folder = CounterFolder()
    text = page(folder)
    worker = metrics.WorkerCounters(str(folder.path))
    worker.start()
    worker.add("s2o:sparse_requests", 2)
    worker.publish()
    assert "s2o:sparse_requests_total 2.0" in text()
    counter_files.shutil.rmtree(folder.path)
    worker.publish()  # into the file that has no name any more
    assert not folder.path.exists(), "it is not the worker's to make"
    assert "s2o:sparse_requests" not in text()
    worker.publish()
    assert "s2o:sparse_requests_total 2.0" in text()


def test_a_folder_is_gone_with_its_owner(root):
    folder = CounterFolder()
    path = folder.path
    CounterFile(path)
    del folder
    assert os.listdir(root) == []


HOLD = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from s2o_vllm.counter_files import CounterFile, CounterFolder
folder = CounterFolder()
CounterFile(folder.path)
print("made", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_no_other(root):
    command = [sys.executable, "-c", HOLD, str(root)]
    killed, alive = (subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2))
    try:
        for process in (killed, alive):
            assert process.stdout.readline() == b"made\n"
        assert len(os.listdir(root)) == 2
        killed.kill()
        killed.wait()
        ours = CounterFolder()
        assert len(os.listdir(root)) == 2
        assert ours.path.exists()
    finally:
        alive.kill()
        alive.wait()


def test_folders_of_others_are_left_alone(root, monkeypatch):
    link, target = root / "s2o-metrics-link", root / "precious"
    target.mkdir()
    link.symlink_to(target)
    fresh = root / "s2o-metrics-fresh"
    fresh.mkdir()
    counter_files.remove_abandoned(root)
    assert target.exists()
    assert link.is_symlink()
    assert fresh.exists(), "another process may be about to lock it"
    old = time.time() - 3600
    os.utime(fresh, (old, old))
    monkeypatch.setattr(counter_files.os, "getuid", lambda: 12345)
    counter_files.remove_abandoned(root)
    assert fresh.exists()
    monkeypatch.undo()
    counter_files.remove_abandoned(root)
    assert not fresh.exists()


def test_a_fork_that_ends_leaves_the_folder(root):
    folder = CounterFolder()
    counter_files.remove(folder.path, os.getpid() + 1)
    assert folder.path.exists()
