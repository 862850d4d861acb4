"""The picture of fidelity against speed: RULER's loss beside attention's speed-up, by budget."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..result_file import REAL, inputs_of
from .plots import COLOURS, MARKERS, shape_of
from .ruler_questions import START
from .samples import DENSE, Row
from .tables import OLDER, Result


class Point(NamedTuple):
    """One budget of a setting on a card.

    Attributes:
        budget: the share of the history that was asked for.
        speed: times faster than paged FlashAttention 3, ranking included.
        difference: RULER's mean less dense's, in points.
        low: lower 95 % bound of it.
        high: upper bound.
    """

    budget: float
    speed: float
    difference: float
    low: float
    high: float


Panel = tuple[str, int, str]  # model, context, place of the question
Series = tuple[str, str]  # ranking or setting, card
Panels = dict[Panel, dict[Series, list[Point]]]


def fidelity_by_speed(
    ruler: Result | None, times: Iterable[Result], served: str
) -> tuple[Panels, list[str]]:
    """Join RULER's mean differences with times of the same shape, context, ranking and budget.

    The ranking of a row of ruler.json is the one that its setting names. Times of real heads go
    before those of random numbers.

    Args:
        ruler: ruler.json, or None.
        times: the files attention*.json.
        served: the ranking where the setting is empty.

    Returns:
        What can be drawn, and a word on each difference that has no time.
    """
    rows = [OLDER | row for row in (ruler["rows"] if ruler else [])]
    speeds = list(_speeds(times))
    panels: Panels = {}
    missing = []
    for row in rows:
        if row["task"] != "mean" or row["budget"] == DENSE or row.get("difference") is None:
            continue
        found = {
            device: speed
            for place, device, speed in speeds
            if place[:3] == (shape_of(row["model"]), row["context"], row["budget"])
            and re.search(rf"\b{re.escape(place[3])}\b", row["setting"] or served)
        }
        if not found:
            setting = f", {row['setting']}" if row["setting"] else ""
            missing.append(
                f"{row['model']}, {row['context']:,} tokens, budget {row['budget']:g}{setting}"
            )
        bounds = (row["difference"], row["difference_low"], row["difference_high"])
        panel = (row["model"], row["context"], row["question"])
        for device, speed in found.items():
            series = panels.setdefault(panel, {}).setdefault((row["setting"] or served, device), [])
            series.append(Point(row["budget"], speed, *bounds))
    return panels, list(dict.fromkeys(missing))


def _speeds(times: Iterable[Result]) -> Iterable[tuple[tuple[str, int, float, str], str, float]]:
    """Yield shape, context, budget and ranking; the card; and the speed-up. Real inputs last."""
    for result in times:
        rows: Sequence[Row] = [
            row for row in result["rows"] if row.get("kv_dtype", "bf16") == "bf16"
        ]
        for row in sorted(rows, key=lambda row: inputs_of(row) == REAL):
            if row.get("fa3_paged_ms") and row.get("total_ms"):
                place = (row["shape"], row["context"], row["budget"], row["ranking"])
                yield place, str(result.get("device")), row["fa3_paged_ms"] / row["total_ms"]


def draw(panels: Mapping[Panel, Mapping[Series, Sequence[Point]]], path: Path) -> None:
    """Draw a panel for each model, context and place of the question, a line for each series.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.6, 4.4), squeeze=False, layout="constrained"
    )
    order = list(dict.fromkeys(series for lines in panels.values() for series in lines))
    legend = {}
    for axis, ((model, context, question), lines) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(0, color="grey", linestyle="--")
        for series, points in lines.items():
            index = order.index(series)
            own = sorted(points, key=lambda point: point.speed)
            below = [one.difference - one.low for one in own]
            above = [one.high - one.difference for one in own]
            legend[series] = axis.errorbar(
                [one.speed for one in own], [one.difference for one in own], (below, above),
                capsize=3, markersize=4,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
            )  # fmt: skip
            for one in own:
                axis.annotate(
                    f"{100 * one.budget:g} %", (one.speed, one.difference),
                    xytext=(5, 4), textcoords="offset points", fontsize="x-small",
                )  # fmt: skip
        asked = ", question first" if question == START else ""
        axis.set_title(f"{model}, {context:,} tokens{asked}", fontsize="medium")
        axis.set_xlabel("attention's speed-up over paged FA3")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("RULER's mean less dense (points)")
    names = [f"{what}, {device}" for what, device in order]
    figure.legend(
        [legend[one] for one in order], names, loc="outside lower center", fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
