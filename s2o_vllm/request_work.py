"""What share of its dense attention work each prompt was prefilled with, as it was planned."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from . import metrics
from .kernels.layout import DENSE_START, LIST_LENGTH, NUM_QUERIES
from .kernels.work_list import PrefillRow, cut_segments
from .requests import RequestInfo
from .step_plan import dense_work

MOST_PROMPTS = 4096  # that are under way: of more, the oldest is forgotten


@dataclass
class Prompt:
    """A prompt that is under way.

    Attributes:
        length: tokens that were computed when it was last heard of, or were cached.
        work: tokens that its queries would have attended to densely.
        skipped: those of them that were not planned to be visited.
    """

    length: int = 0
    work: float = 0.0
    skipped: float = 0.0


def skipped_work(row: PrefillRow, segment: int, min_context: int) -> int:
    """Return the tokens that the queries of a chunk skip, summed over queries, mean over heads.

    They may skip more, where a target error or the early stop ends a list before its budget.
    """
    return sum(
        (line[DENSE_START] - line[LIST_LENGTH]) * line[NUM_QUERIES]
        for line in cut_segments(row, segment, min_context)
        if line[DENSE_START]
    )


class RequestWork:
    """Adds up the chunks of each prompt, and counts its share where it ends."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()

    def step(
        self,
        requests: Sequence[RequestInfo],
        starts: list[int],
        lengths: list[int],
        prefilling: list[bool],
        skipped: dict[int, float],
    ) -> None:
        """Add a step's chunks.

        Groups of the KV cache report the same step one after the other: the first one counts.

        Args:
            requests: of each row.
            starts: first query token of each row, and the end of the last one.
            lengths: tokens of each row including this chunk.
            prefilling: whether a row is still reading its prompt.
            skipped: for each sparse row, by number, the tokens that its queries skip.
        """
        for row, request in enumerate(requests):
            if request.name is None or not prefilling[row]:
                continue
            prompt = self._prompts.setdefault(request.name, Prompt())
            if lengths[row] == prompt.length:
                continue
            if lengths[row] < prompt.length:  # preempted: it begins anew
                prompt = self._prompts[request.name] = Prompt()
            prompt.length = lengths[row]
            own = starts[row : row + 2]
            prompt.work += dense_work([0, own[1] - own[0]], lengths[row : row + 1], [True])
            prompt.skipped += skipped.get(row, 0.0)
            # A chunk of the last token alone is decode, and may not be heard of.
            if 0 < request.prompt <= lengths[row] + 1:
                del self._prompts[request.name]
                if prompt.work:
                    metrics.worker.observe_share(1 - prompt.skipped / prompt.work)
        while len(self._prompts) > MOST_PROMPTS:
            self._prompts.popitem(last=False)


def left_out(
    rows: Collection[PrefillRow], segment: int, min_context: int, sparse_share: float
) -> dict[int, float]:
    """Return the tokens that the queries of sparse rows skip, summed over them, by row.

    Args:
        rows: the sparse ones.
        segment: queries of a segment.
        min_context: segments with less history are dense.
        sparse_share: heads of sparse layers over all heads.
    """
    return {row.row: sparse_share * skipped_work(row, segment, min_context) for row in rows}


tracker = RequestWork()
