"""Rows of a replay, from its requests; the same as CSV."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arms import LoadTestError
from ..report import percentile

Record = dict[str, Any]
SHORT = 4096  # prompt tokens below which a request counts as short
MILLI = 1000.0
OBJECTIVES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}  # vLLM's names


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """Read objectives such as ``ttft:2000``, in ms, as ``vllm bench serve --goodput`` does.

    Raises:
        LoadTestError: naming the text and what is allowed.
    """
    objectives = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in OBJECTIVES or not value.replace(".", "", 1).isdecimal():
            raise LoadTestError(
                f"--goodput is {text!r}, must be ttft:MS, tpot:MS or e2el:MS, such as ttft:2000"
            )
        objectives[name] = float(value)
    return objectives


def good(request: Record, objectives: Mapping[str, float]) -> bool:
    """Tell whether a request was answered within all objectives."""
    if request["error"] is not None:
        return False
    measured = {name: request[OBJECTIVES[name]] for name in objectives}
    return all(
        measured[name] is None or measured[name] <= most for name, most in objectives.items()
    )


def p(requests: Sequence[Record], share: int) -> float | None:
    """Return a percentile of the time to first token in ms, None without an answer."""
    return percentile([one["ttft_ms"] / MILLI for one in requests], share)


def row(head: Record, parts: Sequence[Record], objectives: Mapping[str, float]) -> dict[str, Any]:
    """Return the result file's row of one arm at one load.

    Args:
        head: what names the row.
        parts: its rounds, see :class:`..log.Log`.
        objectives: in ms, by vLLM's names; empty without any.
    """
    requests = [request for part in parts for request in part["requests"]]
    answered = [request for request in requests if request["error"] is None]
    gaps = [gap / MILLI for request in answered for gap in request["gaps_ms"]]
    short = [request for request in answered if request["prompt_tokens"] < SHORT]
    seconds = sum(part["seconds"] for part in parts)
    turns = [
        p([one for one in answered if one["turn"] == turn], 50)
        for turn in range(1, 1 + max(request["turn"] for request in requests))
    ]
    good_ones = sum(good(request, objectives) for request in requests)
    return head | {
        "requests": len(requests),
        "ttft_p50_ms": p(answered, 50),
        "ttft_p99_ms": p(answered, 99),
        "turn_ttft_p50_ms": turns,
        "short_ttft_p50_ms": p(short, 50),
        "short_ttft_p99_ms": p(short, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "objective": " ".join(f"{name}:{most:g}" for name, most in objectives.items()) or None,
        "goodput_rps": round(good_ones / seconds, 4) if objectives else None,
        "answered_rps": round(len(answered) / seconds, 4),
        "output_tok_s": round(sum(one["output_tokens"] for one in answered) / seconds, 3),
        "prefix_hit_share": _over(parts, "prefix_hits", "prefix_queries"),
        "density": _over(parts, "visited", "eligible"),
        "duration_s": round(seconds, 3),
        "failed": len(requests) - len(answered),
    }


def _over(parts: Sequence[Record], part: str, whole: str) -> float | None:
    """Return a share of tokens over all rounds; None where the server does not count them."""
    counted = [one for one in parts if one[whole]]
    if not counted:
        return None
    return round(sum(one[part] for one in counted) / sum(one[whole] for one in counted), 4)


def line(row: Record) -> str:
    """Return a line about a row."""

    def seconds(key: str) -> str:
        return "-" if row[key] is None else f"{row[key] / MILLI:.3f} s"

    def of(key: str, text: str) -> str:
        return "" if row[key] is None else f"; {text} {row[key]:.3f}"

    return (
        f"  {row['backend']}: TTFT p50 {seconds('ttft_p50_ms')}, p99 {seconds('ttft_p99_ms')}; "
        f"{row['answered_rps']:.3f} requests/s{of('goodput_rps', 'goodput')}"
        f"{of('prefix_hit_share', 'prefix hits')}{of('density', 'density')}; {row['failed']} failed"
    )


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    """Write rows as CSV; a list is one cell of JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            lists = {
                key: json.dumps(value) for key, value in row.items() if isinstance(value, list)
            }
            writer.writerow(row | lists)
