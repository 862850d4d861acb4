"""Kernels compile with Triton's cache, or without it where it cannot be written."""

import contextlib
import os
import subprocess

import pytest

from compiling import printed

SCRIPT = "cache_folder.py"


@pytest.fixture
def folder(tmp_path):
    """A temporary folder for what compiles."""
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_the_cache_is_used_where_there_is_one(folder):
    cache, temporary = folder / "cache", folder / "temporary"
    found = printed(SCRIPT, cache, temporary)
    assert found == {
        "refused": None, "failed": None, "compiled": 1, "left": [], "cache": str(cache)
    }  # fmt: skip
    assert os.listdir(cache)


def test_without_a_place_for_a_cache_kernels_compile_all_the_same(folder):
    (folder / "file").touch()
    cache, temporary = folder / "file" / "cache", folder / "temporary"
    found = printed(SCRIPT, cache, temporary)
    assert found == {
        "refused": "NotADirectoryError", "failed": None, "compiled": 1, "left": [],
        "cache": str(cache),
    }  # fmt: skip


def test_a_full_disk_costs_the_cache_alone(folder):
    full = folder / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with contextlib.suppress(OSError), (full / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        found = printed(SCRIPT, full / "cache", folder / "temporary")
    finally:
        subprocess.run(["umount", "-l", str(full)], check=False)
    assert (found["refused"], found["failed"], found["compiled"]) == ("OSError", None, 1)
    assert found["left"] == []


def test_without_any_folder_there_is_one_sentence(folder):
    (folder / "file").touch()
    found = printed(SCRIPT, folder / "file" / "cache", folder / "file" / "temporary")
    assert found["compiled"] == 0
    assert found["failed"].startswith("s2o: kernels cannot be compiled: neither Triton's cache")
    assert "\n" not in found["failed"]
