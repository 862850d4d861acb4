"""Time to first token against request rate, as a picture."""

from pathlib import Path
from typing import Any

from .bench import COLD

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito


def label(row: dict[str, Any]) -> str:
    """Name the line that a row belongs to."""
    name = row["backend"]
    if row["budget"] is not None:
        name += f", budget {row['budget']:g}"
    if row["concurrency"] is not None:
        name += f", at most {row['concurrency']} at once"
    return name


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw one panel for each context length of a result file.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row.get("trace", COLD) == COLD]
    contexts = sorted({row["context"] for row in rows})
    labels = list(dict.fromkeys(label(row) for row in rows))
    figure, axes = pyplot.subplots(
        1, len(contexts), figsize=(6.4 * len(contexts), 4.2), squeeze=False, layout="constrained"
    )
    for axis, context in zip(axes[0], contexts, strict=True):
        for name, colour in zip(labels, COLOURS * len(labels), strict=False):
            own = [row for row in rows if row["context"] == context and label(row) == name]
            _line(axis, sorted(own, key=lambda row: row["rate"]), name, colour)
        axis.set_title(f"{context:,}-token prompts")
        axis.set_xlabel("requests per second")
        axis.set_ylabel("time to first token (s)")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", handlelength=3)
    figure.suptitle(f"vLLM {result['vllm']}, {result['device']}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line(axis: Any, rows: list[dict[str, Any]], name: str, colour: str) -> None:
    """Draw p50 and p99 of one arm, and how many requests failed where some did."""
    for key, style, percentile in (("ttft_p50_ms", "-", "p50"), ("ttft_p99_ms", "--", "p99")):
        points = [(row["rate"], row[key] / 1000) for row in rows if row[key] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour,
                      label=f"{name} ({percentile})")  # fmt: skip
    for row in rows:
        if row["failed"]:
            height = (row["ttft_p99_ms"] or 0) / 1000
            axis.annotate(f"{row['failed']} failed", (row["rate"], height), color=colour,
                          fontsize="small", xytext=(0, 6), textcoords="offset points",
                          ha="center")  # fmt: skip
