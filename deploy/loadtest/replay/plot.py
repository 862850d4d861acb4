"""A replay as a picture: time to first token by turn at each load, and goodput."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plot import COLOURS

SHOWN = {
    "short_ttft_p50_ms": "short\np50", "short_ttft_p99_ms": "short\np99",
    "ttft_p50_ms": "all\np50", "ttft_p99_ms": "all\np99",
}  # fmt: skip


def load_name(row: dict[str, Any]) -> str:
    """Name how requests arrived."""
    if row["rate"] is not None:
        return f"{row['rate']:g} sessions/s"
    if row["concurrency"] is not None:
        return f"{row['concurrency']} session{'s' * (row['concurrency'] > 1)} at once"
    return "the trace's own times"


def arm_name(row: dict[str, Any]) -> str:
    """Name an arm."""
    return row["backend"] + ("" if row["budget"] is None else f", budget {row['budget']:g}")


def draw(result: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows of one trace.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = list(dict.fromkeys(load_name(row) for row in rows))
    arms = list(dict.fromkeys(arm_name(row) for row in rows))
    colours = dict(zip(arms, COLOURS * len(arms), strict=False))
    panels = len(loads) + 1
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.6 * panels, 4.2), squeeze=False, layout="constrained"
    )
    one_turn = max(len(row["turn_ttft_p50_ms"]) for row in rows) == 1
    for axis, load in zip(axes[0], loads, strict=False):
        own = [row for row in rows if load_name(row) == load]
        (_bars if one_turn else _turns)(axis, own, colours)
        axis.set_title(load)
        axis.set_ylabel("time to first token (s)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    _served(axes[0][-1], rows, loads, colours)
    trace, context = rows[0]["trace"], rows[0]["context"]
    figure.suptitle(
        f"{rows[0]['model']}, {trace} up to {context:,} tokens; vLLM {result['vllm']}, "
        f"{result['device']}",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _turns(axis: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    for row in rows:
        medians = enumerate(row["turn_ttft_p50_ms"], 1)
        points = [(turn, value / 1000) for turn, value in medians if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=arm_name(row),
                      color=colours[arm_name(row)])  # fmt: skip
    axis.set_xlabel("turn (median)")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _bars(axis: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        heights = [(row[key] or 0) / 1000 for key in SHOWN]
        places = [place + number * width for place in range(len(SHOWN))]
        axis.bar(places, heights, width, label=arm_name(row), color=colours[arm_name(row)])
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(SHOWN))], SHOWN.values())


def _served(
    axis: Any, rows: Sequence[dict[str, Any]], loads: list[str], colours: dict[str, str]
) -> None:
    """Draw requests answered within the objective, or all answered where there is none."""
    width = 0.8 / len(colours)
    key = "goodput_rps" if rows[0]["objective"] else "answered_rps"
    for number, (arm, colour) in enumerate(colours.items()):
        own = {load_name(row): row[key] for row in rows if arm_name(row) == arm}
        places = [place + number * width for place in range(len(loads))]
        axis.bar(places, [own.get(load) or 0 for load in loads], width, label=arm, color=colour)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(loads))], loads)
    axis.set_ylabel("requests answered per second")
    axis.set_title(f"within {rows[0]['objective']} ms" if rows[0]["objective"] else "throughput")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
