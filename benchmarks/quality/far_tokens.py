"""Tokens whose dense prediction needs far context, and what a budget loses on them.

The rule is that of LongPPL (Fang et al. 2024, arXiv 2410.23771), with dense attention on the
server that is judged: a token is *far* if its log-probability given the whole context is above
-2 nats and more than 2 nats above that given only the nearest tokens. Its *distance* is the
shortest context that restores it to within 2 nats. A budget loses dense's log-probability less its
own. Judged are the last tokens of a window before those that a sparse prefill keeps dense.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .intervals import Interval, mean_clustered
from .samples import Row
from .tables import ALL
from .windows import log_probabilities

GAIN = 2.0  # nats that far context adds, more than this
LIKELY = -2.0  # nats: the log-probability with the whole context is above
DENSE_END = 64  # last tokens of a prompt that a sparse prefill keeps dense


def reaches(near: int, context: int) -> list[int]:
    """Return the context lengths that are compared with the whole, in tokens, shortest first.

    Args:
        near: the nearest tokens, which a far token does not get by with.
        context: the whole; from four times ``near`` lengths double up to half of it.
    """
    found = [near]
    reach = 4 * near
    while reach <= context // 2:
        found.append(reach)
        reach *= 2
    return found


def blocks(context: int, judged: int, reach: int) -> Iterator[tuple[int, int, int]]:
    """Yield the prompts that show each judged token a shorter context.

    A block of at most a quarter of ``reach`` tokens follows ``reach`` tokens of context, so that
    every token sees ``reach`` to 1.25 times ``reach`` tokens.

    Yields:
        Positions in the window: where the prompt begins, where its judged tokens do, its end.
    """
    end = context - DENSE_END
    size = max(reach // 4, 1)
    for start in range(end - judged, end, size):
        yield start - reach, start, min(start + size, end)


def ask(
    complete: Callable[..., Any], budget: float, tokens: Sequence[int], judged: int, reach: int
) -> Row:
    """Ask one window for its judged tokens' log-probabilities.

    Args:
        complete: see `client.complete`.
        budget: the sparsity budget.
        tokens: of the window, its whole context.
        judged: number of tokens that are judged.
        reach: tokens of context that each of them sees; ``len(tokens)`` for all.

    Returns:
        ``logprobs``, a number in nats for each judged token, or ``error``.
    """
    context = len(tokens)
    end = context - DENSE_END
    whole = [(0, end - judged, end)]
    found: list[float] = []
    for start, first, last in whole if reach >= context else blocks(context, judged, reach):
        prompt = list(tokens[start : context if reach >= context else last])
        choice = complete(
            budget, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )  # fmt: skip
        if isinstance(choice, dict):
            return choice
        known = log_probabilities(choice, prompt)
        if known is None:
            return {"error": "the answer lacks prompt_logprobs of every token"}
        found += known[first - start - 1 : last - start - 1]
    return {"logprobs": [round(one, 4) for one in found]}


class Far(NamedTuple):
    """A far token: its number among the judged tokens, and its distance in tokens."""

    number: int
    distance: int


def find(whole: Sequence[float], shorter: Mapping[int, Sequence[float]], context: int) -> list[Far]:
    """Return the far tokens of a window.

    Args:
        whole: dense log-probabilities given the whole context, in nats.
        shorter: the same given shorter contexts, by their length; the shortest is the near one.
        context: length of the whole.
    """
    near, *longer = sorted(shorter)
    found = []
    for number, known in enumerate(whole):
        if known > LIKELY and known - shorter[near][number] > GAIN:
            restoring = (one for one in longer if known - shorter[one][number] <= GAIN)
            found.append(Far(number, next(restoring, context)))
    return found


class Loss(NamedTuple):
    """Nats lost on far tokens of one distance: the mean with its interval, and over what."""

    distance: int | str
    mean: Interval
    tokens: int
    windows: int


def losses(
    sparse: Mapping[str, Sequence[float]],
    dense: Mapping[str, Mapping[int, Sequence[float]]],
    context: int,
) -> list[Loss]:
    """Return what a budget loses, over all far tokens and by distance; windows are the samples.

    Windows that hold no far token leave one loss without a number.

    Args:
        sparse: the budget's log-probabilities given the whole context, by window.
        dense: dense ones by window and length of context; windows without all of them are left
            out.
        context: length of the whole.
    """
    wanted = {reach for known in dense.values() for reach in known}
    lost: dict[int | str, list[list[float]]] = {}
    complete = 0
    for window, own in sparse.items():
        known = dense.get(window, {})
        if known.keys() != wanted or context not in known or len(known) < 2:
            continue
        complete += 1
        shorter = {reach: values for reach, values in known.items() if reach != context}
        of_window: dict[int | str, list[float]] = {}
        for far in find(known[context], shorter, context):
            loss = known[context][far.number] - own[far.number]
            for distance in (ALL, far.distance):
                of_window.setdefault(distance, []).append(loss)
        for distance, values in of_window.items():
            lost.setdefault(distance, []).append(values)
    if complete and not lost:
        return [Loss(ALL, Interval(math.nan, math.nan, math.nan), 0, complete)]
    order = sorted(lost, key=lambda one: 0 if isinstance(one, str) else one)
    return [
        Loss(one, mean_clustered(lost[one]), sum(map(len, lost[one])), len(lost[one]))
        for one in order
    ]


def bounded(interval: Interval, digits: int = 4) -> Row:
    """Return the fields ``value``, ``low``, ``high``; bounds that do not exist are null."""
    return {
        name: None if math.isnan(value) else round(value, digits)
        for name, value in interval._asdict().items()
    }
