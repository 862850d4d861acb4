"""``s2o eval quick``: some two minutes on a running server that tell whether a change costs tasks.

Asks RULER's vt, niah_multikey_2 and niah_multiquery (`s2o eval ruler`) and the tokens of source
code that need far context (`s2o eval fidelity`), each at dense and at the given budgets, and prints
one table of paired differences to dense. The full commands measure more of the same.

Answers are thrown away; with --out they are kept in a folder, and continued where they end.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import client, fidelity, ruler
from .samples import DENSE, EvalError, Row
from .tables import ALL, bounds, column, read_result, table

TASKS = ("vt", "niah_multikey_2", "niah_multiquery")
DIFFERENCE = ("difference", "difference_low", "difference_high")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval quick", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    client.add_server_options(parser)
    add("--tasks", type=Path, required=True, metavar="DIR", help="folder of task files")
    add("--context", type=client.count, default=32768, metavar="TOKENS",
        help="length of tasks and of code (default: %(default)s)")  # fmt: skip
    add("--samples", type=client.count, default=24, metavar="N",
        help="prompts of each task (default: %(default)s)")  # fmt: skip
    add("--windows", type=client.count, default=8, metavar="N",
        help="windows of code (default: %(default)s)")  # fmt: skip
    add("--code", type=Path, metavar="FILE",
        help="source code (default: that of this Python's standard library)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="keep answers and rows in this folder")
    return parser


def evaluate(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Run both evaluations into a folder; return this run's questions, raw.

    Raises:
        EvalError: as they do.
    """
    server = client.words(args)
    tasks = [
        "--tasks", args.tasks, "--only", *TASKS, "--contexts", args.context,
        "--samples", args.samples, "--out", folder / "ruler.json",
    ]  # fmt: skip
    code = [
        "--what", fidelity.FAR["code"], "--context", args.context, "--windows", args.windows,
        "--out", folder / "fidelity.json",
    ]  # fmt: skip
    if args.code:
        code += ["--texts", f"code={args.code}"]
    asked = []
    for command, more in ((fidelity, code), (ruler, tasks)):
        parsed = command.build_parser().parse_args([*server, *map(str, more)])
        asked += command.evaluate(parsed)
    return asked


def quick_table(tasks: Sequence[Row], far: Sequence[Row], setting: str) -> str:
    """Return one table: dense scores, and each budget's difference to dense.

    Args:
        tasks: rows of ruler.json, in percent.
        far: rows of fidelity.json, in nats.
        setting: whose rows to show.
    """
    tasks = [row for row in tasks if row["setting"] == setting]
    far = [row for row in far if row["setting"] == setting]
    budgets = sorted({row["budget"] for row in (*tasks, *far)} - {DENSE}, reverse=True)
    lines = []
    for task, question in dict.fromkeys((row["task"], row["question"]) for row in tasks):
        own = {r["budget"]: r for r in tasks if (r["task"], r["question"]) == (task, question)}
        name = f"{task}, question at the {question}"
        lines.append([
            name, bounds(own.get(DENSE, {}), ("score", "low", "high"), 1),
            *(bounds(own.get(one, {}), DIFFERENCE, 1, signed=True) for one in budgets),
        ])  # fmt: skip
    for distance in dict.fromkeys(row["distance"] for row in far):
        losses = {row["budget"]: row for row in far if row["distance"] == distance}
        tokens = max(row["samples"] for row in losses.values())
        where = "all distances" if distance == ALL else f"within {distance:,}"
        lines.append([
            f"nats lost, {tokens} far tokens of code, {where}", "-",
            *(bounds(losses.get(one, {}), ("value", "low", "high"), 3, signed=True)
              for one in budgets),
        ])  # fmt: skip
    backend = next((row["backend"] for row in tasks), "s2o")
    return table([setting, "dense", *(column(backend, one) for one in budgets)], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when every question was answered, 1 when some were refused, 2 when it cannot work.
    """
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="s2o-quick-") as scratch:
        folder = args.out or Path(scratch)
        try:
            asked = evaluate(args, folder)
            results = [read_result(folder / name) for name in ("ruler.json", "fidelity.json")]
        except EvalError as error:
            print(f"s2o eval quick: {error}", file=sys.stderr)
            return 2
    tasks, far = [result["rows"] if result else [] for result in results]
    print(quick_table(tasks, far, args.setting))
    if args.out:
        print(f"rows: {args.out}")
    if refusals := client.tell_refusals(asked):
        print(f"s2o eval quick: {refusals}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
