"""A picture of attention.json: milliseconds of one layer's attention against context."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..quality.plots import COLOURS, MARKERS
from ..result_file import REAL, inputs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Dense attention: its key in a row, name in the legend, colour and line style.
DENSE = (
    ("fa3_paged_ms", "FA3, paged (vLLM's own)", "#000000", "-"),
    ("fa3_ms", "FA3, contiguous", "#444444", "--"),
    ("cudnn_ms", "cuDNN", "#777777", "-."),
    ("fa2_ms", "FA2", "#999999", ":"),
)
DENSE_FP8 = ("fa3_paged_ms", "FA3, paged, fp8 KV", "#000000", ":")
LIGHTEST = 0.6  # share of white in the colour of a ranking's smallest budget


class Line(NamedTuple):
    """One line of a panel.

    Attributes:
        label: its name in the legend.
        points: context in tokens and milliseconds, in the order of the contexts.
        style: how matplotlib draws it.
    """

    label: str
    points: list[tuple[int, float]]
    style: dict[str, Any]


def lines(rows: Sequence[Row]) -> list[Line]:
    """Return the lines of one shape and input; a key that no row holds makes none.

    Args:
        rows: of one shape and input.
    """
    fp8 = [row for row in rows if row.get("kv_dtype") == "fp8"]
    plain = [row for row in rows if row.get("kv_dtype") != "fp8"]
    made = [
        Line(name, _points(of, key), {"color": colour, "linestyle": dash, "marker": "."})
        for of, (key, name, colour, dash) in [*((plain, line) for line in DENSE), (fp8, DENSE_FP8)]
    ]
    for index, ranking in enumerate(dict.fromkeys(row["ranking"] for row in rows)):
        colour = COLOURS[index % len(COLOURS)]
        own, quantised = ([row for row in of if row["ranking"] == ranking] for of in (plain, fp8))
        # The same work at every budget: one line stands for all.
        ranked = _points(own, "rank_ms", statistics.median)
        style = {"color": colour, "linestyle": (0, (2, 2)), "linewidth": 1, "marker": "."}
        made.append(Line(f"{ranking}, ranking alone", ranked, style))
        for of, suffix, dash in ((own, "", "-"), (quantised, ", fp8 KV", "--")):
            budgets = sorted({row["budget"] for row in of})
            for place, budget in enumerate(budgets):
                white = LIGHTEST * (1 - (place + 1) / len(budgets))
                style = {"color": _lighter(colour, white), "linestyle": dash}
                style["marker"] = MARKERS[place % len(MARKERS)]
                points = _points([row for row in of if row["budget"] == budget], "total_ms")
                made.append(Line(f"{ranking}, budget {budget:g}{suffix}", points, style))
    return [line for line in made if line.points]


def _points(
    rows: Sequence[Row], key: str, of: Callable[[Iterable[float]], float] = min
) -> list[tuple[int, float]]:
    """Return a point a context; where several rows hold one, ``of`` their times."""
    times: dict[int, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            times.setdefault(row["context"], []).append(row[key])
    return [(context, of(own)) for context, own in sorted(times.items())]


def _lighter(colour: str, white: float) -> tuple[float, ...]:
    """Mix a colour (``#rrggbb``) with a share of white; return red, green, blue from 0 to 1."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(part + (1 - part) * white for part in parts)


def figure(result: Mapping[str, Any]) -> "Figure":
    """Return the picture: one panel a shape and input, both axes logarithmic.

    Args:
        result: content of a result file, with one row at least.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    rows = result["rows"]
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["shape"], inputs_of(row)), []).append(row)
    made = Figure(figsize=(5.4 * len(panels) + 2.2, 5.4), layout="constrained")
    axes = made.subplots(1, len(panels), squeeze=False)[0]
    legend: dict[str, Any] = {}
    for axis, ((shape, inputs), own) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for line in lines(own):
            style = {"markersize": 5, "linewidth": 1.6, **line.style}
            x, y = zip(*line.points, strict=True)
            (drawn,) = axis.plot(x, y, label=line.label, **style)
            legend.setdefault(line.label, drawn)
        title = f"{shape}, real heads" if inputs == REAL else shape
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("context (tokens)")
        axis.xaxis.set_major_locator(ticker.FixedLocator(sorted({row["context"] for row in own})))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("one layer's attention (ms)")
    made.legend(list(legend.values()), list(legend), loc="outside right center", fontsize="small")
    made.suptitle(
        f"{result.get('device')}; vLLM {result.get('vllm')}; commit {result.get('commit')}; "
        f"{result.get('date')}",
        fontsize="small",
    )
    return made


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        result: content of a result file, with one row at least.
        path: PNG file to write.

    Raises:
        ImportError: without matplotlib.
    """
    made = figure(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=110)
