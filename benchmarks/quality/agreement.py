"""Whether an answer begins as dense attention's does: greedy tokens, compared one by one."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from .intervals import Interval, mean_share, mean_student
from .samples import Row

ANSWER = 64  # tokens of an answer that are compared


def ask(complete: Callable[..., Any], budget: float, tokens: Sequence[int]) -> Row:
    """Ask for a prompt's continuation.

    Args:
        complete: see `client.complete`; it asks greedily.
        budget: the sparsity budget.
        tokens: of the prompt.

    Returns:
        ``tokens``, at most `ANSWER` ids, or ``error``.
    """
    choice = complete(
        budget, prompt=list(tokens), max_tokens=ANSWER, extra_body={"return_token_ids": True}
    )  # fmt: skip
    if isinstance(choice, dict):
        return choice
    found = (choice.model_extra or {}).get("token_ids")
    if not isinstance(found, list):
        return {"error": "the answer lacks token_ids"}
    return {"tokens": found}


class Agreement(NamedTuple):
    """Share of equal answers in [0, 1], mean common prefix in tokens, and pairs of answers."""

    share: Interval
    prefix: Interval
    pairs: int


def compare(
    own: Mapping[str, Sequence[int]], dense: Mapping[str, Sequence[int]]
) -> Agreement | None:
    """Compare answers to the same prompts; None where there are no two.

    Args:
        own: token ids by prompt.
        dense: those of dense attention.
    """
    both = [(own[prompt], dense[prompt]) for prompt in own if prompt in dense]
    if not both:
        return None
    same = [float(list(one) == list(other)) for one, other in both]
    prefix = [common(one, other) for one, other in both]
    return Agreement(mean_share(same), mean_student(prefix), len(both))


def common(one: Sequence[int], other: Sequence[int]) -> float:
    """Return how many tokens two answers begin with alike; equal answers count `ANSWER`."""
    if list(one) == list(other):
        return float(ANSWER)
    pairs = zip(one, other, strict=False)
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
