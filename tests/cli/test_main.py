import subprocess
import sys

import pytest

from s2o_vllm import cli


def run(*words):
    command = [sys.executable, "-m", "s2o_vllm.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_it_imports_no_heavy_package():
    code = (
        "import sys, s2o_vllm.cli; s2o_vllm.cli.build_parser(); "
        "print([name for name in ('torch', 'triton', 'vllm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_follows_the_command_is_passed_on_untouched(monkeypatch):
    seen = {}

    class Module:
        @staticmethod
        def main(argv):
            seen["argv"] = argv
            return 7

    def import_module(name):
        seen["name"] = name
        return Module

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["serve", "--port", "1", "org/model", "--", "-h"]) == 7
    assert seen == {
        "name": "s2o_vllm.cli.serve",
        "argv": ["--port", "1", "org/model", "--", "-h"],
    }
    assert cli.main(["eval", "ruler", "--help"]) == 7
    assert seen == {"name": "s2o_vllm.benchmarks.quality.ruler", "argv": ["--help"]}


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["doctor"], "s2o_vllm.cli.doctor"),
        (["serve"], "s2o_vllm.cli.serve"),
        (["bench", "attention"], "s2o_vllm.benchmarks.speed.attention"),
        (["bench", "decode"], "s2o_vllm.benchmarks.speed.decode"),
        (["bench", "serve"], "s2o_vllm.benchmarks.speed.serve"),
        (["bench", "ttft"], "s2o_vllm.benchmarks.speed.ttft"),
        (["eval", "attention"], "s2o_vllm.benchmarks.quality.evaluate"),
        (["eval", "ruler"], "s2o_vllm.benchmarks.quality.ruler"),
        (["eval", "ruler-tasks"], "s2o_vllm.benchmarks.quality.ruler_make"),
        (["eval", "perplexity"], "s2o_vllm.benchmarks.quality.perplexity"),
        (["eval", "report"], "s2o_vllm.benchmarks.quality.report"),
        (["loadtest"], "s2o_vllm.loadtest"),
    ],
)
def test_every_command_imports_its_own_module(monkeypatch, words, module):
    asked = []

    def import_module(name):
        asked.append(name)
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(words) == 2
    assert asked == [module]


@pytest.mark.parametrize("words", [[], ["nonsense"], ["eval"], ["bench", "nonsense"], ["--wrong"]])
def test_unknown_commands_are_argparse_errors(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    assert "usage: s2o" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (
            "s2o_vllm.benchmarks",
            "s2o: 'bench ttft' is not part of this installation "
            "(there is no module s2o_vllm.benchmarks).",
        ),
        (
            "matplotlib",
            "s2o: 'bench ttft' needs the Python package 'matplotlib', which is not installed.",
        ),
    ],
)
def test_a_missing_module_is_one_sentence(monkeypatch, capsys, missing, sentence):
    def import_module(name):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["bench", "ttft"]) == 2
    assert capsys.readouterr().err.strip() == sentence


def test_interrupting_a_command_is_no_traceback(monkeypatch):
    class Module:
        @staticmethod
        def main(argv):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)
    assert cli.main(["doctor"]) == 130


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    for word in ("doctor", "serve", "bench", "eval", "loadtest"):
        assert f"    {word} " in done.stdout
