"""What the selection loses of a ranking: mass that the best tokens by the same scores would hold.

``python -m s2o_vllm.benchmarks.research.selection_loss`` takes the options of `s2o eval attention`.
The selection counts scores by bucket, of long histories one of every ``step`` tokens, and never
sorts. A step of 2, 4 or 8 is what a history of 32K, 64K or 128K has; step 0 is the best tokens
(ours).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from s2o_vllm.kernels.selection.reference import select_positions
from s2o_vllm.kernels.tuning import TIERS_UNORDERED

from ..quality.attention import Segment
from ..quality.evaluate import run_judge
from ..quality.measure import measure
from ..quality.ranking import Method
from ..quality.results import Row
from ..quality.selection import Selection

STEPS = (0, 1, 2, 4, 8)


@torch.inference_mode()
def judge(segment: Segment, method: Method, budgets: Sequence[float]) -> list[Row]:
    """Measure lists as each step makes them, of the same length on average, for every budget."""
    ranking = method.ranking(segment)
    scores = ranking.scores.half().float()  # as the kernels keep them
    rows: list[Row] = []
    for budget in budgets:
        count = max(1, int(budget * segment.history))
        for step in STEPS:
            tokens = [
                select_positions(one, count, segment.history, TIERS_UNORDERED, step)
                if step
                else one.topk(count).indices
                for one in scores
            ]
            found = measure(segment, Selection(ranking.rows, tokens))
            rows.append(
                {
                    "budget": budget,
                    "step": step,
                    "density": round(found.density, 5),
                    "dropped_mass": round(found.dropped_mass, 4),
                    "relative_mse": round(found.relative_mse, 5),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    out = Path("benchmarks/results/quality_selection.json")
    return run_judge("selection loss", judge, argv, methods=["served"], out=out)


if __name__ == "__main__":
    sys.exit(main())
