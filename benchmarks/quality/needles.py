"""How many of the keys that single queries look for are in the lists: recall of needles.

``python -m s2o_vllm.benchmarks.quality.needles`` takes the options of `s2o eval attention`. A
needle is a query and a far key of large probability that the segment's queries hardly want on
average: what a token that copies something needs. Mean errors and dropped mass do not see them,
nats lost on tokens that need far context do (`LOG.md`, "Means of queries"). Ours.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .attention import Segment
from .evaluate import run_judge
from .methods import DEFAULTS
from .ranking import Method
from .results import Row

LEAST = 0.2  # probability of a needle
COMMON = 0.02  # the same key's mean over the segment's queries, less than this
FIRST = 64  # tokens of the history that are no needles: attention sinks are among them
LAST = 1024  # likewise: a list has neighbours in any case
METHODS = tuple(name for name in DEFAULTS if name != "s2o")  # what is served, and others' methods


def needles(segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Find the needles of a segment.

    Returns:
        Flat rows (head * queries + query), keys and probabilities, each ``[needles]``.
    """
    rows, keys, found = [], [], []
    for head in range(segment.heads):
        logits = segment.q[head] @ segment.k[head // segment.group].T * segment.scale
        p = (logits - segment.dense.lse[head, :, None]).exp()
        rare = (p > LEAST) & (p.mean(0) < COMMON)
        rare[:, :FIRST] = False
        rare[:, max(segment.history - LAST, 0) :] = False
        row, key = rare.nonzero(as_tuple=True)
        rows.append(row + head * segment.length)
        keys.append(key)
        found.append(p[row, key])
    return torch.cat(rows), torch.cat(keys), torch.cat(found)


@torch.inference_mode()
def judge(segment: Segment, method: Method, budgets: Sequence[float]) -> list[Row]:
    """Measure the recall of a method's lists for every budget."""
    rows, keys, probability = segment.memo("needles", lambda: needles(segment))
    selector = method.selector(segment)
    result: list[Row] = []
    for budget in budgets:
        selection = selector.select(budget)
        held = torch.zeros(len(rows), dtype=torch.bool)
        for unit, tokens in zip(selection.rows.rows, selection.tokens, strict=True):
            held |= torch.isin(rows, unit) & torch.isin(keys, tokens)
        result.append(
            {
                "budget": budget,
                "needles": len(rows),
                "probability": round(float(probability.sum()), 4),
                "held": round(float(probability[held].sum()), 4),
            }
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    out = Path("benchmarks/results/quality_needles.json")
    return run_judge("needles", judge, argv, methods=list(METHODS), out=out)


if __name__ == "__main__":
    sys.exit(main())
