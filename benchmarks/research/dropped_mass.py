"""How well a sample of the skipped tokens estimates the dropped softmax mass.

``python -m s2o_vllm.benchmarks.research.dropped_mass`` takes the options of ``s2o eval attention``.
A list leaves out few large probabilities and many small ones, so a few hundred of the skipped
tokens, evenly spaced, say what all of them weigh. Judged per head and unit: the mean over its
queries, as the server's metric `s2o:dropped_mass` reports it. Ours.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quality.attention import Segment
from ..quality.evaluate import run_judge
from ..quality.ranking import Method
from ..quality.results import Row

SAMPLES = (128, 256, 512, 1024)
FACTOR = 1.5  # an estimate within this factor of the truth is good


def sampled(probability: Tensor, samples: int) -> Tensor:
    """Estimate row sums from evenly spaced columns.

    Args:
        probability: ``[rows, columns]``, at least one column.
        samples: columns to look at; all of them if there are no more.

    Returns:
        ``[rows]``.
    """
    columns = probability.shape[1]
    samples = min(samples, columns)
    positions = torch.arange(samples, device=probability.device) * columns // samples
    positions += columns // (2 * samples)
    return probability[:, positions].sum(1) * (columns / samples)


def compare(truth: Tensor, estimate: Tensor) -> dict[str, float]:
    """Summarise estimates ``[n]`` of positive numbers: means, and quantiles of their ratio."""
    ratio = estimate / truth
    good = (ratio <= FACTOR) & (ratio >= 1 / FACTOR)
    low, middle, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95], device=ratio.device))
    values = {
        "dropped_mass": truth.mean(),
        "estimate": estimate.mean(),
        "ratio_p5": low,
        "ratio_p50": middle,
        "ratio_p95": high,
        "within_factor": good.float().mean(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


@torch.inference_mode()
def judge(segment: Segment, method: Method, budgets: Sequence[float]) -> list[Row]:
    """Compare estimates with the truth, for every budget and number of samples."""
    selector = method.selector(segment)
    queries, lse = segment.q.flatten(0, 1), segment.dense.lse.flatten()
    rows: list[Row] = []
    for budget in budgets:
        selection = selector.select(budget)
        truth: list[Tensor] = []
        found: dict[int, list[Tensor]] = {samples: [] for samples in SAMPLES}
        for unit, tokens in enumerate(selection.tokens):
            own, kv = selection.rows.rows[unit], int(selection.rows.kv[unit])
            skipped = torch.ones(segment.history, dtype=torch.bool, device=queries.device)
            skipped[tokens] = False
            scores = queries[own] @ segment.k[kv, skipped].T * segment.scale
            probability = (scores - lse[own, None]).exp()
            heads = own // segment.length
            for head in heads.unique():
                of_head = probability[heads == head]
                truth.append(of_head.sum(1).mean())
                for samples in SAMPLES:
                    found[samples].append(sampled(of_head, samples).mean())
        for samples in SAMPLES:
            values = compare(torch.stack(truth), torch.stack(found[samples]))
            rows.append({"budget": budget, "samples": samples, "tiles": len(truth), **values})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_judge("dropped mass", judge, argv)


if __name__ == "__main__":
    sys.exit(main())
