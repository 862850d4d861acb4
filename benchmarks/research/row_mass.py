"""How well a row's log-sum-exp is known from low-rank scores, and from fewer exponentials.

``python -m s2o_vllm.benchmarks.research.row_mass`` takes the options of ``s2o eval attention``;
methods that are not low-rank are refused. An error common to all rows of a tile changes no
ranking, so besides the bias the deviation inside tiles of 128 queries is given.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..quality.attention import Segment
from ..quality.evaluate import build_parser, read_arguments, run, segments
from ..quality.reductions import LSE_ESTIMATES
from ..quality.results import Row, write_rows
from .low_rank import LowRank, LowRankScores

TILE = 128


def summarise(error: Tensor) -> tuple[float, float, float]:
    """Summarise errors [H, S] in nats: bias, deviation inside tiles, 95th percentile of it."""
    tiles = error.unflatten(1, (-1, TILE))
    inside = tiles - tiles.mean(2, keepdim=True)
    return (
        float(error.mean()),
        float(inside.square().mean().sqrt()),
        float(inside.abs().flatten().quantile(0.95)),
    )


@torch.inference_mode()
def judge(segment: Segment, method: LowRank) -> list[Row]:
    """Compare every estimate from the low-rank scores with the exact row log-sum-exp."""
    score = LowRankScores(segment, method.rank, method.chunk, method.basis, method.queries)
    found: dict[str, list[Tensor]] = {name: [] for name in LSE_ESTIMATES}
    for head in range(segment.heads):
        s = score(head, segment.q[head])
        for name, estimate in LSE_ESTIMATES.items():
            found[name].append(estimate(s))
    rows = []
    for name, values in found.items():
        for truth, exact in (("full", segment.past.lse), ("low_rank", torch.stack(found["lse"]))):
            bias, inside, high = summarise(torch.stack(values) - exact)
            rows.append(
                {
                    "shift": name,
                    "against": truth,
                    "bias": round(bias, 4),
                    "spread": round(inside, 4),
                    "spread_p95": round(high, 4),
                }
            )
    return rows


def evaluate(arguments: argparse.Namespace) -> list[Row]:
    """Measure every layer, position and method and write the result file."""
    spec, methods = read_arguments(arguments)
    rows: list[Row] = []
    for place, segment in tqdm(segments(arguments, spec), desc="row mass", unit="segment"):
        for method in methods:
            if not isinstance(method, LowRank):
                raise ValueError(f"{method.name} has no low-rank scores.")
            named = place | {"basis": method.basis, "rank": method.rank, "chunk": method.chunk}
            rows += [named | row for row in judge(segment, method)]
    write_rows(arguments.out, rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run("row mass", build_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    sys.exit(main())
