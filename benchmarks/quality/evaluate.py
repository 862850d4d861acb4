"""``s2o eval attention``: the error of every method on one model's real attention.

For each layer, segment position, method and density: relative error of the attention output
and dropped softmax mass, in fp32, the segment's own tokens always dense. Rows that a result
file already holds are not measured again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from s2o_vllm.kernels.tuning import STOP_STEP_TOKENS

from ..result_file import commit, local_device
from .attention import Segment
from .capture import DTYPES, CaptureError, CaptureSpec, capture, check, load
from .measure import Errors, early_stop, measure
from .methods import DEFAULTS, parse, settings
from .ranking import Method
from .results import Row, identity, mean_over, read_rows, write_rows

DENSITIES = (0.02, 0.05, 0.1)
POSITIONS = (0.5, 1.0)
SEGMENT = 512


def numbers(text: str) -> list[float]:
    """Read ``0.02,0.05``."""
    return [float(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="s2o eval attention", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Hugging Face model")
    add("--text", type=Path, required=True, help="UTF-8 text file")
    add("--context", type=int, default=32768, help="prompt length in tokens")
    add("--layers", default="2,8,14,20,26", help="layers, separated by commas")
    add("--densities", type=numbers, default=DENSITIES, help="shares of the history to visit")
    add("--methods", nargs="+", default=DEFAULTS, help="NAME or NAME:SETTING=VALUE,...")
    add("--positions", type=numbers, default=POSITIONS, help="where segments end, of the context")
    add("--segment", type=int, default=SEGMENT, help="queries of a segment")
    add("--taus", type=numbers, default=(), help="also stop early at these thresholds")
    add(
        "--stop-step",
        type=int,
        default=STOP_STEP_TOKENS,
        help="tokens between two early-stop tests",
    )
    add("--yarn", type=float, default=1.0, help="factor of the YaRN position scaling")
    add("--dtype", choices=DTYPES, default="bf16", help="of the model and of what is captured")
    add("--device", default="cpu", help="where the model and the methods run")
    add("--cache", type=Path, default=Path(".cache/quality"), help="folder for captures")
    add("--out", type=Path, default=Path("benchmarks/results/quality.json"), help="result file")
    return parser


def read_arguments(arguments: argparse.Namespace) -> tuple[CaptureSpec, list[Method]]:
    """Check the options and return what they ask for; raises ValueError with one sentence."""
    try:
        layers = tuple(int(layer) for layer in arguments.layers.split(","))
    except ValueError:
        raise ValueError(f"--layers must be numbers, not {arguments.layers!r}.") from None
    if not all(0 < density <= 1 for density in arguments.densities):
        raise ValueError("--densities must be above 0 and at most 1.")
    if arguments.stop_step < 1:
        raise ValueError("--stop-step must be at least 1.")
    if not all(0 < position <= 1 for position in arguments.positions):
        raise ValueError("--positions must be above 0 and at most 1.")
    for position in arguments.positions:
        if segment_start(arguments, position) <= 0:
            raise ValueError(
                f"A segment of {arguments.segment} that ends at {position:g} of a context of "
                f"{arguments.context} has no history."
            )
    methods = [parse(spec) for spec in arguments.methods]
    spec = CaptureSpec(
        arguments.model, arguments.text, arguments.context, layers, arguments.yarn,
        dtype=arguments.dtype,
    )  # fmt: skip
    check(spec)
    return spec, methods


def segment_start(arguments: argparse.Namespace, position: float) -> int:
    """Return where the segment that ends at this share of the context starts."""
    end = int(arguments.context * position)
    return end - arguments.segment


def evaluate(arguments: argparse.Namespace) -> list[Row]:
    """Measure what is asked and not yet in the result file, and write it.

    Args:
        arguments: the options, checked.

    Returns:
        All rows of the result file.
    """
    spec, methods = read_arguments(arguments)
    torch.manual_seed(0)
    rows = read_rows(arguments.out)
    known = {identity(row) for row in rows}
    with torch.device(arguments.device), tqdm(desc="evaluate", unit="method") as bar:
        bar.total = len(spec.layers) * len(arguments.positions) * len(methods)
        for place, segment in segments(arguments, spec):
            for method in methods:
                bar.set_postfix_str(f"layer {segment.layer}, {method.name}")
                new = missing_rows(place, method, arguments, known)
                rows += judge(segment, method, new)
                known |= {identity(row) for row in new}
                bar.update()
            write_rows(arguments.out, rows)
    return rows


def segments(arguments: argparse.Namespace, spec: CaptureSpec) -> Iterator[tuple[Row, Segment]]:
    """Capture what is missing, and yield every segment with the fields of a row that name it."""
    capture(spec, arguments.cache, arguments.device)
    for layer, position in product(spec.layers, arguments.positions):
        data = load(spec, arguments.cache, layer, arguments.device)
        place = {
            "model": spec.model.name,
            "text": spec.text.stem,
            "context": spec.context,
            "layer": layer,
            "position": position,
            "segment": arguments.segment,
        }
        if spec.dtype != "bf16":
            place["dtype"] = spec.dtype
        yield place, Segment(data, segment_start(arguments, position), arguments.segment)


def judge_all(
    arguments: argparse.Namespace,
    judge: Callable[[Segment, Method, Sequence[float]], list[Row]],
    name: str,
) -> list[Row]:
    """Judge every method on every segment at all densities, and write the result file.

    What the file holds of other places and methods stays.
    """
    spec, methods = read_arguments(arguments)
    kept, rows = read_rows(arguments.out), list[Row]()
    with torch.device(arguments.device):
        for place, segment in tqdm(segments(arguments, spec), desc=name, unit="segment"):
            for method in methods:
                named = place | {"method": method.name, "unit": method.unit}
                kept = [row for row in kept if not named.items() <= row.items()]
                rows += [named | row for row in judge(segment, method, arguments.densities)]
    write_rows(arguments.out, kept + rows)
    return kept + rows


def run_judge(
    name: str,
    judge: Callable[[Segment, Method, Sequence[float]], list[Row]],
    argv: Sequence[str] | None,
    **defaults: Any,
) -> int:
    """Run :func:`judge_all` as a command; the default method is the one that serves."""
    parser = build_parser()
    parser.set_defaults(**{"methods": ["served"]} | defaults)
    return run(name, parser.parse_args(argv), partial(judge_all, judge=judge, name=name))


def missing_rows(
    place: Row, method: Method, arguments: argparse.Namespace, known: set[str]
) -> list[Row]:
    """Return the rows to measure of one method, without their measured values."""
    wanted = []
    for budget in arguments.densities:
        for tau in (None, *arguments.taus):
            row = place | {
                "method": method.name,
                "unit": method.unit,
                "settings": settings(method),
                "budget": budget,
            }
            if tau is not None:
                row |= {"tau": tau, "stop_step": arguments.stop_step}
            if identity(row) not in known:
                wanted.append(row)
    return wanted


@torch.inference_mode()
def judge(segment: Segment, method: Method, rows: list[Row]) -> list[Row]:
    """Fill in the measured values of a method's rows."""
    if not rows:
        return rows
    selector = method.selector(segment)
    for budget in sorted({row["budget"] for row in rows}):
        selection = selector.select(budget)
        plain = [row for row in rows if row["budget"] == budget and "tau" not in row]
        stopped = [row for row in rows if row["budget"] == budget and "tau" in row]
        for row in plain:
            fill(row, measure(segment, selection))
        if stopped:
            bare = replace(selection, summaries=None)
            taus, step = [row["tau"] for row in stopped], stopped[0]["stop_step"]
            for row, errors in zip(stopped, early_stop(segment, bare, taus, step), strict=True):
                fill(row, errors)
    return rows


def fill(row: Row, errors: Errors) -> None:
    """Put measured values into a row, and where they come from; no time is measured here."""
    row |= {name: float(f"{value:.4g}") for name, value in errors._asdict().items()}
    row |= {"attention_ms": None, "commit": commit(), "device": local_device()}


def table(rows: list[Row]) -> str:
    """Return mean errors over layers and positions as lines of text."""
    plain = [row for row in rows if "tau" not in row]
    keys = ("model", "context", "method", "unit", "settings", "budget")
    means = mean_over(plain, keys, "relative_mse")
    return "\n".join(f"{value:.4f}  {' '.join(key)}" for key, value in means.items())


def run(
    name: str,
    arguments: argparse.Namespace,
    evaluate: Callable[[argparse.Namespace], list[Row]],
    show: Callable[[list[Row]], str] | None = None,
) -> int:
    """Run an evaluation and return its exit code; bad input is one sentence and exit 2."""
    try:
        rows = evaluate(arguments)
    except (CaptureError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    if show is not None:
        print(show(rows))
    print(f"{len(rows)} rows in {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run("s2o eval attention", build_parser().parse_args(argv), evaluate, table)


if __name__ == "__main__":
    sys.exit(main())
