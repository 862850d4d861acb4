"""``s2o eval report``: benchmarks/QUALITY.md and its pictures, from the result files alone.

Reads quality.json, quality_layers.json (the same of every layer of a model), ruler.json,
fidelity.json, perplexity.json and, for times, attention*.json in a folder; what is not there is
"not measured". Every number of the report stands in one of these files.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from s2o_vllm.config import S2OConfig

from .samples import EvalError, Row
from .tables import (
    Result,
    fidelity_tables,
    needle_table,
    number,
    perplexity_table,
    read_result,
    ruler_tables,
    table,
)

NAMES = (
    "quality", "quality_layers", "quality_needles", "attention", "ruler", "ruler_h200", "fidelity",
    "perplexity",
)  # fmt: skip
# What attention.json's rankings compute, as a method of quality.json.
RANKINGS = {
    "low_rank": "served",
    "mean_query": "mean_query:unit=512xkv,rule=heads,correction=regions",
}
# Settings of `served` in files that are older than clusters, which the reports still show.
SERVED_BEFORE = {"correction": "regions"}
NOT_DRAWN = "not drawn: matplotlib is not installed (`pip install 's2o-vllm[bench]'`)."
NOT_MEASURED = "Not measured: `{file}` has no rows; `{command}` makes them."
COMMANDS = {
    "quality": "s2o eval attention --model DIR --text FILE",
    "quality_layers": "s2o eval attention --layers 0,1,2,... --out quality_layers.json",
    "quality_needles": "python -m s2o_vllm.benchmarks.quality.needles --model DIR --text FILE",
    "attention": "s2o bench attention",
    "ruler": "s2o eval ruler --url URL --tasks DIR",
    "ruler_h200": "s2o eval ruler --url URL --tasks DIR --out benchmarks/results/ruler_h200.json",
    "fidelity": "s2o eval fidelity --url URL --texts text=FILE",
    "perplexity": "s2o eval perplexity --url URL --text FILE",
}
ATTENTION = """\
Relative MSE of the attention output against dense attention, fp32, mean over layers and segment
positions; the segment's own tokens are always dense. A column is the share of the history that is
visited. `served` goes through the kernels' own functions; oracles rank by the true attention."""
LAYERS = """\
The same over all layers of the model: their mean, and each of them."""
RULER = """\
RULER's scores: the share of the wanted strings that the answer holds, in percent, greedy decoding,
with 95 % intervals (Wilson's); "less dense" is the paired difference on the same prompts and the
same server. Sparse attention begins above the server's `min_context`. RULER asks after the text,
where the prompt's dense end reads the question; "question before the text" leaves only the opening
of the answer there. Other settings than the default's are named."""
NEEDLES = """\
Needles: a query and a far key of probability above 0.2 that the segment's queries want with less
than 0.02 on average, as a token does that copies something. A column is the share of their
probability that a method's lists hold, in percent, at equal density. `served` goes through the
kernels' own functions; oracles rank by the true attention, all queries of a list together."""
FIDELITY = """\
Nats lost on tokens of real text and code whose dense prediction needs far context: their
log-probability is above -2 nats given the whole context and more than 2 nats lower given the last
2,048 tokens alone (LongPPL, arXiv 2410.23771). "within" is the shortest context that restores them,
in brackets their number; Student's 95 % bounds over windows. Agreement: the share of greedy answers
whose first 64 tokens are dense attention's; in the line of dense, its own answers asked twice."""
PERPLEXITY = """\
Of a text's tokens given all before them, mean over windows; nll is in nats a token, differences are
paired by window, with Student's 95 % bounds over windows. The tail is a window's last tokens."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="folder of result files (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("benchmarks/QUALITY.md"), metavar="FILE",
        help="default: %(default)s")  # fmt: skip
    add("--plots", type=Path, metavar="DIR", help="default: the folder 'plots' beside the report")
    return parser


def chosen_rows(quality: Result | None) -> tuple[list[str], list[Row]]:
    """Return the methods to report, in order, and their rows, named by the method's spec.

    Every method of `methods.DEFAULTS` and of `RANKINGS` at its default setting; other settings
    and early-stop rows are left to the log.
    """
    from .methods import DEFAULTS

    specs = list(dict.fromkeys([*DEFAULTS, *RANKINGS.values()]))
    rows = quality["rows"] if quality else []
    return specs, [row | {"method": spec} for spec in specs for row in of_method(rows, spec)]


def of_method(rows: Sequence[Row], spec: str) -> list[Row]:
    """Return the rows of a method at the settings of its spec, without an early stop.

    None where `benchmarks/research` is not there and the method is one of its.
    """
    from .methods import METHODS, parse, settings

    if spec.partition(":")[0] not in METHODS:
        return []
    method = parse(spec)
    for own in (settings(method), settings(method) | SERVED_BEFORE):
        wanted = {"method": method.name, "unit": method.unit, "settings": own}
        found = [row for row in rows if wanted == {key: row[key] for key in wanted}]
        if found or method.name != "served":
            break
    return [row for row in found if "tau" not in row]


def attention_tables(order: Sequence[str], rows: Sequence[Row]) -> str:
    """Return errors: for each model, text and context, methods by densities."""
    from .plots import error_by_density

    parts = []
    for (model, text, context), points in error_by_density(rows).items():
        budgets = sorted({point.budget for point in points})
        lines = []
        for method in order:
            own = {point.budget: point.error for point in points if point.method == method}
            if own:
                lines.append([f"`{method}`", *(number(own.get(one), 4) for one in budgets)])
        head = ["method", *(f"{100 * one:g} %" for one in budgets)]
        parts.append(f"{model}, {text}, {context:,} tokens:\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def layer_tables(order: Sequence[str], rows: Sequence[Row]) -> str:
    """Return errors of every layer: for each model, text and context, layers by methods."""
    from .plots import error_by_density

    parts = [attention_tables(order, rows)]
    layers = {
        layer: error_by_density([row for row in rows if row["layer"] == layer])
        for layer in sorted({row["layer"] for row in rows})
    }
    for place, points in error_by_density(rows).items():
        settings = sorted(
            {(point.method, point.budget) for point in points},
            key=lambda one: (order.index(one[0]), one[1]),
        )
        lines = []
        for layer, places in layers.items():
            own = {(point.method, point.budget): point.error for point in places.get(place, ())}
            lines.append([str(layer), *(number(own.get(setting), 4) for setting in settings)])
        head = ["layer", *(f"`{method}`, {100 * budget:g} %" for method, budget in settings)]
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def source(name: str, result: Result | None) -> str:
    """Return one line on where numbers come from."""
    if result is None:
        return ""
    versions = ", ".join(
        f"{key} {result[key]}" for key in ("vllm", "torch", "triton") if result.get(key)
    )
    return (
        f"`{name}.json`: {result.get('device')}; {versions}; commit {result.get('commit')}; "
        f"{result.get('date')}."
    )


def pictures(
    results: dict[str, Result | None], order: Sequence[str], rows: Sequence[Row], folder: Path
) -> dict[str, Path | str]:
    """Draw what can be drawn; return for each picture its file, or why there is none."""
    from .plots import dense_times, draw, error_by_density, error_by_time, partial

    attention = results["attention"]
    by_time = partial(error_by_time(rows, attention, RANKINGS))
    wanted = {
        "density": (
            partial(error_by_density(rows)),
            "share of the history that is visited",
            ("quality",),
        ),
        "time": (by_time, "attention of one layer (ms)", ("quality", "attention")),
    }
    made: dict[str, Path | str] = {}
    for name, (panels, xlabel, files) in wanted.items():
        path = folder / f"error_by_{name}.png"
        if not panels:
            path.unlink(missing_ok=True)  # of results that are no longer there
            what = "an error" if name == "density" else "an error and a time at one setting"
            made[name] = f"not measured, for no result file holds {what}."
        elif importlib.util.find_spec("matplotlib") is None:
            made[name] = NOT_DRAWN
        else:
            devices = {file: result["device"] for file in files if (result := results[file])}
            title = "; ".join(f"{file}.json: {device}" for file, device in devices.items())
            dense = dense_times(attention, list(panels)) if name == "time" else None
            draw(panels, order, xlabel, title, path, dense)
            made[name] = path
    return made


def speed_picture(ruler: Result | None, times: Sequence[Result], path: Path) -> tuple[str, str]:
    """Draw fidelity against speed.

    Returns:
        Why there is no picture, empty where there is; and which differences it leaves out.
    """
    from .fidelity_plot import draw, fidelity_by_speed

    panels, missing = fidelity_by_speed(ruler, times, S2OConfig().ranking)
    note = ""
    if missing:
        note = f"Not drawn, for attention*.json has no time of the same: {'; '.join(missing)}."
    if not panels:
        path.unlink(missing_ok=True)
        return (
            "not measured, for no result files hold a difference and a time at one setting.",
            note,
        )
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_DRAWN, note
    draw(panels, path)
    return "", note


def write(
    results: dict[str, Result | None], out: Path, plots: Path, times: Sequence[Result] = ()
) -> str:
    """Draw the pictures, write the report and return its text.

    Args:
        results: content of each of `NAMES`, None where there is no file.
        out: the report's file.
        plots: folder of the pictures.
        times: content of the files attention*.json.
    """
    order, rows = chosen_rows(results["quality"])
    images = pictures(results, order, rows, plots)
    speed = plots / "fidelity_by_speed.png"
    reason, note = speed_picture(results["ruler"], times, speed)
    images["speed"] = reason or speed

    def section(title: str, text: str, name: str, body: str) -> str:
        missing = NOT_MEASURED.format(file=f"{name}.json", command=COMMANDS[name])
        parts = [text, body, source(name, results[name])] if body else [missing]
        return "\n\n".join(filter(None, [f"## {title}", *parts]))

    def image(name: str, title: str) -> str:
        made = images[name]
        if isinstance(made, str):
            return f"{title}: {made}"
        return f"![{title}]({os.path.relpath(made, out.parent)})"

    def body(name: str, make: Callable[[Result | None], str]) -> str:
        result = results[name]
        return make(result) if result and result["rows"] else ""

    parts = [
        "# Quality",
        "Written by `s2o eval report` from the files in `benchmarks/results`; do not edit. What "
        "was tried on the way stands in `quality/LOG.md`.",
        section("RULER", RULER, "ruler", body("ruler", ruler_tables)),
        *(
            [section("RULER, on an H200", "", "ruler_h200", body("ruler_h200", ruler_tables))]
            if results["ruler_h200"]
            else []
        ),
        image("speed", "Fidelity against speed"),
        *filter(None, [note]),
        section("Far context", FIDELITY, "fidelity", body("fidelity", fidelity_tables)),
        section("Needles", NEEDLES, "quality_needles", body("quality_needles", needle_table)),
        section("Perplexity", PERPLEXITY, "perplexity", body("perplexity", perplexity_table)),
        section("Attention", ATTENTION, "quality", attention_tables(order, rows)),
        section(
            "All layers", LAYERS, "quality_layers",
            layer_tables(*every) if (every := chosen_rows(results["quality_layers"]))[1] else "",
        ),
        image("density", "Error against density"),
        image("time", "Error against time"),
    ]  # fmt: skip
    if results["attention"] is not None:
        parts.append(source("attention", results["attention"]))
    text = "\n\n".join(parts) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, also where nothing was measured; 2 when a file is no result file.
    """
    args = build_parser().parse_args(argv)
    try:
        if not args.results.is_dir():
            raise EvalError(f"--results is {args.results}, must be a folder")
        results = {name: read_result(args.results / f"{name}.json") for name in NAMES}
        times = [read_result(path) for path in sorted(args.results.glob("attention*.json"))]
        plots = args.plots or args.out.parent / "plots"
        write(results, args.out, plots, [result for result in times if result])
    except EvalError as error:
        print(f"s2o eval report: {error}", file=sys.stderr)
        return 2
    missing = [f"{name}.json" for name, result in results.items() if result is None]
    print(f"report: {args.out}" + (f" (not measured: {', '.join(missing)})" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
