"""Which requests decode sparsely: slots that keep the ranking of the end of their prompts."""

from collections.abc import Callable, Sequence

from .config import S2OConfig
from .kernels.decode_state import DecodeRow, Snapshot, choose_snapshot
from .kernels.tuning import CHUNK_SPANS, SNAPSHOT_QUERIES, SPAN_LENGTH
from .kernels.work_list import WorkList
from .requests import RequestBudget

NO_STATE = "no_decode_state"


class DecodeSlots:
    """The slots of a group of layers, which all of them fill and read in the same steps.

    A request takes one at the end of its prompt, if any is free, and keeps it over preemptions:
    its keys are the same when it comes back. Slots of requests that are gone are taken again.

    Args:
        settings: of the server.
        alive: maps a request's name to whether the request still exists.
    """

    def __init__(self, settings: S2OConfig, alive: Callable[[str], bool]):
        self.settings, self.alive = settings, alive
        self._owners: list[str | None] = [None] * settings.decode_requests
        self._covered = [0] * settings.decode_requests  # tokens whose projected keys a slot holds

    def take(self, name: str, covered: int) -> int | None:
        """Return a request's slot, which then covers ``covered`` tokens; None if all are taken.

        Its own, if it has one: a prompt that is computed again fills it again.
        """
        slot = self.of(name)
        if slot is None:
            free = (
                number
                for number, owner in enumerate(self._owners)
                if owner is None or not self.alive(owner)
            )
            slot = next(free, None)
        if slot is not None:
            self._owners[slot], self._covered[slot] = name, covered
        return slot

    def of(self, name: str) -> int | None:
        """Return the slot that a request has, or None."""
        return self._owners.index(name) if name in self._owners else None

    def step(
        self,
        starts: Sequence[int],
        seq_lens: Sequence[int],
        prefilling: Sequence[bool],
        budgets: Sequence[RequestBudget],
        names: Sequence[str | None],
    ) -> tuple[list[DecodeRow], list[str]]:
        """Return the rows of a batch that decode sparsely, and why others do not that could.

        The slots of the rows cover their queries' own tokens from now on. Arguments are those of
        :func:`step_plan.split_rows`, and each row's request.
        """
        rows: list[DecodeRow] = []
        reasons: list[str] = []
        for row, (total, name) in enumerate(zip(seq_lens, names, strict=True)):
            context = total - 1
            if (
                starts[row + 1] - starts[row] != 1
                or prefilling[row]
                or budgets[row].sparsity_budget >= 1
                or context < max(self.settings.decode_min_context, 1)
            ):
                continue
            slot = None if name is None else self.of(name)
            if slot is None or self._covered[slot] > context:
                reasons.append(NO_STATE)
                continue
            rows.append(DecodeRow(row, starts[row], context, slot, self._covered[slot]))
            self._covered[slot] = total
        return rows, reasons

    def take_snapshots(
        self,
        work: Sequence[WorkList],
        budgets: Sequence[RequestBudget],
        names: Sequence[str | None],
        tail: int,
    ) -> dict[int, Snapshot]:
        """Take slots for the rows of a step whose prompt comes to its end.

        A chunk that begins just before the end may have too few queries to fit a basis for decode:
        then the snapshot of the chunk before it stays.

        Args:
            work: lists of the sparse rows.
            budgets: of every row of the batch.
            names: of every row's request.
            tail: tokens at the end of a prompt that are not prefilled sparsely.

        Returns:
            The snapshots to take, by the number of the work list: the first one of a chunk.
        """
        taken = {}
        for number, one in enumerate(work):
            name, prompt = names[one.row], budgets[one.row].prompt
            if (
                not one.first_of_chunk
                or name is None
                or prompt < self.settings.decode_min_context
                or one.max_seen <= max(0, prompt - tail - CHUNK_SPANS * SPAN_LENGTH)
            ):
                continue
            found = choose_snapshot(one, 0)
            ends = one.max_seen >= prompt - tail
            if found.queries >= SNAPSHOT_QUERIES or (ends and self.of(name) is None):
                slot = self.take(name, found.tokens)
                if slot is not None:
                    taken[number] = found._replace(slot=slot)
        return taken
