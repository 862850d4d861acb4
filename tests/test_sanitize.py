"""The command that runs the kernels' tests under compute-sanitizer, with a stand-in for that."""

import sys

import pytest

import sanitize


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Make a compute-sanitizer that notes its arguments and ends with codes by tool."""
    notes = tmp_path / "notes"

    def make(**codes):
        cases = "".join(f"{tool}) exit {code};; " for tool, code in codes.items())
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {notes}\n'
            f'case "$2" in {cases}*) exit 0;; esac\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sanitize, "has_card", lambda: True)
        return notes

    return make


def test_every_tool_runs_the_kernels_tests(stand_in, capfd):
    notes = stand_in()
    assert sanitize.main(["-k", "attend"]) == 0
    lines = notes.read_text().splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["1", "--tool", tool] for tool in sanitize.TOOLS
    ]
    for line in lines:
        assert f"{sys.executable} -m pytest tests/kernels" in line
        assert line.endswith("-q -k attend")
    assert "nothing found" in capfd.readouterr().out


def test_what_one_tool_finds_does_not_stop_the_others(stand_in, capfd):
    notes = stand_in(memcheck=sanitize.FOUND, racecheck=1)
    assert sanitize.main([]) == 1
    assert len(notes.read_text().splitlines()) == 3
    said = capfd.readouterr().out
    assert "sanitize: memcheck has found something; racecheck saw tests fail" in said


def test_tools_can_be_chosen(stand_in):
    notes = stand_in()
    assert sanitize.main(["--tools", "racecheck"]) == 0
    assert "--tool racecheck" in notes.read_text()
    assert "memcheck" not in notes.read_text()


def test_without_the_tool_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err.startswith("sanitize: found no compute-sanitizer")


def test_without_a_card_there_is_one_sentence(stand_in, monkeypatch, capsys):
    notes = stand_in()
    monkeypatch.setattr(sanitize, "has_card", lambda: False)
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err == "sanitize: found no CUDA device\n"
    assert not notes.exists()


def test_the_files_that_are_left_out_are_there():
    assert all((sanitize.ROOT / "tests/kernels" / name).exists() for name in sanitize.LEFT_OUT)


def test_it_is_found_beside_pytorchs_libraries(monkeypatch, tmp_path):
    folder = tmp_path / "nvidia" / "cu13" / "compute-sanitizer"
    folder.mkdir(parents=True)
    program = folder / "compute-sanitizer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("nvidia", None)
    assert sanitize.sanitizer() == str(program)
