"""Pictures of the quality result files: error against density, and error against time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..result_file import RANDOM, inputs_of
from .samples import Row
from .tables import Result

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D")
DENSE = "dense (FA3, paged)"  # its name in the legend
WHOLE = 0.999  # a density from here on is all of the history


class Point(NamedTuple):
    """One method at one budget.

    Attributes:
        method: the method's name.
        budget: the share that was asked for.
        x: mean density, or milliseconds of attention.
        error: relative MSE of the attention output against dense attention.
    """

    method: str
    budget: float
    x: float
    error: float


Place = tuple[str, str, int]  # model, text, context
Panels = dict[Place, list[Point]]


def error_by_density(rows: Sequence[Row]) -> Panels:
    """Return points of error and density, averaged over layers and positions.

    Args:
        rows: of quality.json, one setting a method.
    """
    return _points(rows, lambda place, method, budget, own: _mean(own, "density"))


def partial(panels: Panels) -> Panels:
    """Leave out what visits the whole history: its error is rounding, far below the rest."""
    kept = {place: [p for p in points if p.budget < WHOLE] for place, points in panels.items()}
    return {place: points for place, points in kept.items() if points}


def error_by_time(
    rows: Sequence[Row], attention: Result | None, rankings: Mapping[str, str]
) -> Panels:
    """Return points of error and time: quality.json's own times, else attention.json's.

    A time of attention.json counts only where context and budget are the same and its shape is
    the model's. What has no time is left out.

    Args:
        rows: of quality.json, one setting a method.
        attention: attention.json, or None.
        rankings: method of quality.json that computes what a ranking of attention.json does.
    """
    times = {
        (row["shape"], row["context"], rankings.get(row["ranking"]), row["budget"]): row["total_ms"]
        for row in _rows(attention)
    }

    def time(place: Place, method: str, budget: float, own: Sequence[Row]) -> float | None:
        if all(row.get("attention_ms") is not None for row in own):
            return _mean(own, "attention_ms")
        return times.get((shape_of(place[0]), place[2], method, budget))

    return _points(rows, time)


def dense_times(attention: Result | None, places: Sequence[Place]) -> dict[Place, float]:
    """Return the milliseconds of dense paged attention (FlashAttention 3) at places."""
    known = {(row["shape"], row["context"]): row["fa3_paged_ms"] for row in _rows(attention)}
    found = {place: known.get((shape_of(place[0]), place[2])) for place in places}
    return {place: ms for place, ms in found.items() if ms is not None}


def shape_of(model: str) -> str:
    """Return attention.json's name of a model's shape: a coder has that of its base model."""
    return model.removesuffix("-instruct").replace("-coder", "")


def _rows(attention: Result | None) -> list[Row]:
    """Return attention.json's rows of one kind of input: of random numbers, in a bf16 cache.

    quality.json has no fp8 cache, and the errors of real heads stand beside their own times.
    """
    rows = attention["rows"] if attention else []
    plain = [row for row in rows if row.get("kv_dtype", "bf16") == "bf16"]
    return [row for row in plain if inputs_of(row) == RANDOM]


def _points(
    rows: Sequence[Row], x: Callable[[Place, str, float, Sequence[Row]], float | None]
) -> Panels:
    groups: dict[tuple[Place, str, float], list[Row]] = {}
    for row in rows:
        place = (row["model"], row["text"], row["context"])
        groups.setdefault((place, row["method"], row["budget"]), []).append(row)
    panels: Panels = {}
    for (place, method, budget), own in groups.items():
        value = x(place, method, budget, own)
        if value is not None:
            point = Point(method, budget, value, _mean(own, "relative_mse"))
            panels.setdefault(place, []).append(point)
    return panels


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def draw(
    panels: Panels,
    order: Sequence[str],
    xlabel: str,
    title: str,
    path: Path,
    dense: Mapping[Place, float] | None = None,
) -> None:
    """Draw one panel a model, text and context, one line a method, both axes logarithmic.

    Args:
        panels: what to draw, at least one panel.
        order: methods in the order of the legend.
        xlabel: meaning of the points' ``x``.
        title: what measured it.
        path: PNG file to write.
        dense: where on the x axis dense attention is marked.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.6, 4.4), squeeze=False, layout="constrained"
    )
    legend = {}
    for axis, (place, points) in zip(axes[0], panels.items(), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for index, method in enumerate(order):
            own = sorted((point.x, point.error) for point in points if point.method == method)
            if own:
                (legend[method],) = axis.plot(
                    *zip(*own, strict=True), markersize=4, color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                )  # fmt: skip
        if dense and place in dense:
            legend[DENSE] = axis.axvline(dense[place], color="grey", linestyle="--")
        model, text, context = place
        axis.set_title(f"{model}, {text}, {context:,} tokens", fontsize="medium")
        axis.set_xlabel(xlabel)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative MSE of the attention output")
    lines = [legend[name] for name in (*order, DENSE) if name in legend]
    names = [name for name in (*order, DENSE) if name in legend]
    figure.legend(lines, names, loc="outside right upper", fontsize="small")
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
