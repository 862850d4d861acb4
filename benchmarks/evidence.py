"""Every figure of one setting on one card, in one go: speed alone, then tasks side by side.

``python -m s2o_vllm.benchmarks.evidence OUT --model DIR --tasks DIR --text FILE`` first times what
needs the card for itself (`s2o bench ttft`, `s2o bench attention` on random numbers and on real
heads). Then one server answers RULER (`s2o eval ruler`), shortest context first, while another
process reads far tokens and, with ``--tests``, a third runs the kernels' tests on the card.

Steps that ended well are named in OUT/done; run again, only the others run, and RULER goes on where
it ended. Each step has a log. Result files lie in OUT, as the commands write them.
"""

import argparse
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from s2o_vllm.cli.server_process import ServerError, starting

from .quality.client import budget, count
from .quality.ruler_tasks import read_tasks
from .quality.samples import EvalError

SHAPE = "llama-3.1-8b"
SPEED_CONTEXTS = (32768, 131072)
FIRST_TOKEN_CONTEXTS = (32768, 131000)
FAR_WINDOWS = {32768: 12, 65536: 14, 131072: 7}  # that the text has, and how many are read
FAR = "s2o_vllm.benchmarks.research.in_process"  # a wheel leaves it out
SERVER_FLAGS = (
    "--max-num-batched-tokens", "8192", "--max-num-seqs", "16", "--no-enable-prefix-caching",
    "--kv-cache-memory-bytes", "14000000000", "--gpu-memory-utilization", "0.2",
    "--attention-backend", "s2o",
)  # fmt: skip


class Step(NamedTuple):
    """A command of this package.

    Attributes:
        name: unique; names its log and its line in OUT/done.
        words: the module and its arguments.
    """

    name: str
    words: list[str]


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.evidence", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for results and logs")
    add("--model", type=Path, required=True, metavar="DIR", help="that answers; a folder")
    add("--tasks", type=Path, required=True, metavar="DIR", help="RULER's, see s2o eval ruler")
    add("--text", type=Path, required=True, metavar="FILE", help="that real heads read")
    add("--budget", type=budget, default=0.0125, metavar="B")
    add("--min-budget-tokens", type=int, default=1024, metavar="TOKENS")
    add("--concurrency", type=count, default=8, metavar="N", help="questions of RULER at once")
    add("--tests", type=Path, metavar="DIR", help="a checkout whose kernel tests run as well")
    add("--port", type=int, default=8101)
    return parser


def alone(args: argparse.Namespace) -> list[Step]:
    """Return the steps that need the card for themselves."""
    cli = "s2o_vllm.cli"
    setting = [
        "--budgets", f"{args.budget:g}", "--min-budget-tokens", str(args.min_budget_tokens)
    ]  # fmt: skip
    contexts = ["--contexts", *map(str, SPEED_CONTEXTS)]
    attention = [
        cli, "bench", "attention", "--shapes", SHAPE, *contexts, *setting,
        "--rankings", "low_rank", "--kv-dtypes", "bf16", "--plot", str(args.out / "attention.png"),
    ]  # fmt: skip
    first = ["--contexts", *map(str, FIRST_TOKEN_CONTEXTS), *setting, "--repeat", "2"]
    heads = ["--inputs", "real-heads", "--model", str(args.model), "--text", str(args.text)]
    return [
        Step("ttft", [cli, "bench", "ttft", *first, "--out", str(args.out / "ttft.json")]),
        Step(
            "attention_random",
            [*attention, "--inputs", "random", "--out", str(args.out / "attention_random.json")],
        ),
        Step(
            "attention_real", [*attention, *heads, "--out", str(args.out / "attention_real.json")]
        ),
    ]


def asked(args: argparse.Namespace) -> list[Step]:
    """Return the questions to the server: RULER, a step a context.

    Raises:
        EvalError: if the folder holds no tasks.
    """
    contexts = sorted({sample.context for sample in read_tasks(args.tasks, None, None)})
    words = [
        "s2o_vllm.cli", "eval", "ruler", "--tasks", str(args.tasks),
        "--url", f"http://127.0.0.1:{args.port}", "--budgets", "1.0", f"{args.budget:g}",
        "--setting", f"at least {args.min_budget_tokens:,} tokens",
        "--concurrency", str(args.concurrency), "--out", str(args.out / "ruler.json"),
    ]  # fmt: skip
    return [Step(f"ruler_{one}", [*words, "--contexts", str(one)]) for one in contexts]


def concurrent(args: argparse.Namespace) -> list[list[Step]]:
    """Return what runs with the server, each list one step after the other."""
    far = [
        Step(
            f"far_{context}",
            [
                FAR, str(args.model), "--context", str(context), "--windows", str(windows),
                "--lists", "served", "--budgets", f"{args.budget:g}",
                "--min-budget-tokens", str(args.min_budget_tokens),
                "--out", str(args.out / f"far_{context}.json"),
            ],
        )
        for context, windows in FAR_WINDOWS.items()
    ]  # fmt: skip
    streams = [far] if importlib.util.find_spec(FAR.rpartition(".")[0]) else []
    if args.tests:
        kernels, precision = (
            args.tests / "tests/kernels",
            args.tests / "tests/gpu/test_precision.py",
        )
        tests = ["pytest", "-v", "-n", "5", "--dist", "worksteal", "-m", "not e2e"]
        streams.append([Step("tests", [*tests, str(kernels), str(precision)])])
    return streams


class Run:
    """What is done, and what is said of it."""

    def __init__(self, out: Path):
        self.out, self.done = out, out / "done"
        self.failed: list[str] = []
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def ended_well(self) -> set[str]:
        """Return the names of the steps that need not run again."""
        return set(self.done.read_text().split()) if self.done.exists() else set()

    def steps(self, steps: Sequence[Step]) -> None:
        """Run steps one after the other; a failure ends none of the others."""
        for step in steps:
            if step.name in self.ended_well():
                continue
            since = time.monotonic()
            with (self.out / f"{step.name}.log").open("ab") as log:
                command = [sys.executable, "-P", "-m", *step.words]
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            with self.lock:
                if code == 0:
                    with self.done.open("a") as file:
                        file.write(f"{step.name}\n")
                else:
                    self.failed.append(step.name)
                took = f"{time.monotonic() - since:.0f} s"
                end = "done" if code == 0 else f"exit code {code}, see {step.name}.log"
                print(f"{step.name}: {end} ({took})", flush=True)

    def together(self, streams: Sequence[Sequence[Step]]) -> None:
        """Run streams of steps side by side until all have ended."""
        threads = [threading.Thread(target=self.steps, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    run = Run(args.out)
    try:
        questions = asked(args)
        run.steps(alone(args))
        flags = [
            *SERVER_FLAGS, "--max-model-len", "131072", "--s2o-sparsity-budget", f"{args.budget:g}",
            "--s2o-min-budget-tokens", str(args.min_budget_tokens),
        ]  # fmt: skip
        with starting(args.model, args.port, flags, args.out / "server.log") as ready:
            ready()
            run.together([questions, *concurrent(args)])
    except (EvalError, ServerError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    if run.failed:
        print(f"evidence: failed: {', '.join(run.failed)}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
