"""The console command ``s2o``: what stock vLLM has no place for.

Each command imports its own module when it is called; importing this package imports neither
torch nor vLLM.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .. import __version__


class Command(NamedTuple):
    """A command's module (its ``main(argv)`` is called) and its line in the help."""

    module: str
    help: str


COMMANDS: dict[tuple[str, ...], Command] = {
    ("doctor",): Command("s2o_vllm.cli.doctor", "say whether S2O would run here, and why not"),
    ("serve",): Command("s2o_vllm.cli.serve", "start vLLM's server with S2O on"),
    ("probe",): Command("s2o_vllm.cli.probe", "tell whether a server still works"),
    ("bench", "attention"): Command("s2o_vllm.benchmarks.speed.attention", "time attention alone"),
    ("bench", "decode"): Command(
        "s2o_vllm.benchmarks.speed.decode", "time what S2O leaves to vLLM: decode and short prompts"
    ),
    ("bench", "profile"): Command(
        "s2o_vllm.benchmarks.speed.profile", "say where a long prompt's time goes on the GPU"
    ),
    ("bench", "replay"): Command(
        "s2o_vllm.benchmarks.speed.replay", "replay conversations on stock vLLM and S2O"
    ),
    ("bench", "report"): Command(
        "s2o_vllm.benchmarks.speed.report", "write the speed report from the result files"
    ),
    ("bench", "serve"): Command(
        "s2o_vllm.benchmarks.speed.serve", "load a server with a mix of requests"
    ),
    ("bench", "turns"): Command(
        "s2o_vllm.benchmarks.speed.turns", "time short turns behind long histories"
    ),
    ("bench", "ttft"): Command(
        "s2o_vllm.benchmarks.speed.ttft", "time the first token of a server"
    ),
    ("eval", "attention"): Command(
        "s2o_vllm.benchmarks.quality.evaluate", "measure the error of sparse attention"
    ),
    ("eval", "fidelity"): Command(
        "s2o_vllm.benchmarks.quality.fidelity", "measure what is lost of far context"
    ),
    ("eval", "quick"): Command(
        "s2o_vllm.benchmarks.quality.quick", "tell in minutes whether a change costs tasks"
    ),
    ("eval", "ruler"): Command("s2o_vllm.benchmarks.quality.ruler", "score a model's answers"),
    ("eval", "ruler-tasks"): Command(
        "s2o_vllm.benchmarks.quality.ruler_make", "make RULER's tasks for a tokenizer and a length"
    ),
    ("eval", "perplexity"): Command(
        "s2o_vllm.benchmarks.quality.perplexity", "measure how well a model predicts a text"
    ),
    ("eval", "report"): Command(
        "s2o_vllm.benchmarks.quality.report", "write the quality report from the result files"
    ),
    ("loadtest",): Command(
        "s2o_vllm.loadtest", "drive running servers: rising rates, or conversations"
    ),
}
GROUPS = {"bench": "measure speed", "eval": "measure quality"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own words; what follows belongs to the command."""
    parser = argparse.ArgumentParser(
        prog="s2o", description="Sparse prefill attention (S2O) for stock vLLM."
    )
    parser.add_argument("--version", action="version", version=f"s2o-vllm {__version__}")
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = {}
    for (word, *rest), command in COMMANDS.items():
        if not rest:
            top.add_parser(word, help=command.help, add_help=False)
            continue
        if word not in groups:
            group = top.add_parser(word, help=GROUPS[word], description=GROUPS[word])
            groups[word] = group.add_subparsers(dest="what", required=True, metavar="WHAT")
        groups[word].add_parser(rest[0], help=command.help, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after ``s2o``; default: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    depth = 2 if words[:1] and words[0] in GROUPS else 1
    build_parser().parse_args(words[:depth])  # help, or an error that names the commands
    path, rest = tuple(words[:depth]), words[depth:]
    name = COMMANDS[path].module
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(f"s2o: {_missing(' '.join(path), name, error.name or name)}", file=sys.stderr)
        return 2
    try:
        return int(module.main(rest) or 0)
    except KeyboardInterrupt:
        return 130


def _missing(command: str, module: str, missing: str) -> str:
    """Return one sentence for a command whose module, or one it imports, is not there."""
    if module == missing or module.startswith(missing + "."):
        return f"'{command}' is not part of this installation (there is no module {missing})."
    return f"'{command}' needs the Python package {missing!r}, which is not installed."
