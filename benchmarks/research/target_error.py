"""What a target error makes of lists: their density, the mass they really leave out, the error.

``python -m s2o_vllm.benchmarks.research.target_error`` takes the options of ``s2o eval attention``;
``--densities`` are the targets. A list ends where the ranking's own scores say that what it leaves
out holds less than the target. Scores are the largest probability of any row, a target is about
the mean row: one constant stands between them (`plan.MEAN_OF_MAX`), and this says how well. Ours.
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch

from s2o_vllm.kernels.selection.reference import list_lengths

from ..quality.attention import Segment
from ..quality.evaluate import run_judge
from ..quality.measure import measure
from ..quality.ranking import Method
from ..quality.results import Row
from ..quality.selection import lengths_by_pairs


@torch.inference_mode()
def judge(segment: Segment, method: Method, targets: Sequence[float]) -> list[Row]:
    """Measure what every target gives, with the whole history as the budget."""
    selector = method.selector(segment)
    scores = selector.ranking.scores
    rows: list[Row] = []
    for target in targets:
        lengths = partial(list_lengths, count=segment.history, target_error=target)
        counts = lengths_by_pairs(scores, segment.kv_heads, lengths)
        errors = measure(segment, selector.take(counts))
        rows.append(
            {"target_error": target} | {k: round(v, 4) for k, v in errors._asdict().items()}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_judge("target error", judge, argv, densities=(0.02, 0.05, 0.1, 0.2))


if __name__ == "__main__":
    sys.exit(main())
