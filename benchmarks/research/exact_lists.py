"""Lists by exact probabilities, the largest over the query rows that share a list.

No estimate of a ranking exceeds them, so that a criterion is known before a kernel is written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from s2o_vllm.kernels.layout import DENSE_START, HISTORY, NUM_QUERIES, QUERY_START
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.ranking import basis
from s2o_vllm.kernels.side_stream import SideStream
from s2o_vllm.kernels.tuning import CHUNK
from s2o_vllm.kernels.work_list import WorkList

TOGETHER = 8  # segments whose exact scores are held at a time


def exact_scores(
    query: Tensor, kv_cache: Tensor, block_table: Tensor, work: WorkList, *, scale: float
) -> Tensor:
    """Score histories by exact probabilities, the largest over a segment's query rows.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, page, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments, of one request.
        scale: softmax scale.

    Returns:
        float16 ``[segments, kv_heads, max_history]``, log2-probabilities; -inf behind a history.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    scores = query.new_full(
        (work.num_segments, kv_heads, work.max_history), float("-inf"), dtype=torch.float16
    )
    segments = [(i, line) for i, line in enumerate(work.segments.tolist()) if line[DENSE_START] > 0]
    pages = -(-work.max_seen // page)
    blocks = kv_cache[block_table[work.row, :pages].long(), ..., :head_dim]
    keys = blocks.transpose(0, 1).flatten(1, 2)  # [kv_heads, tokens, head_dim]
    for first in range(0, len(segments), TOGETHER):
        part = segments[first : first + TOGETHER]
        seen = max(line[HISTORY] + line[NUM_QUERIES] for _, line in part)
        own = torch.arange(max(line[NUM_QUERIES] for _, line in part), device=query.device)
        # A short segment repeats its last row, which no maximum sees.
        place = torch.stack([own.clamp(max=line[NUM_QUERIES] - 1) for _, line in part])
        start, history = (
            torch.tensor([line[column] for _, line in part], device=query.device)[:, None]
            for column in (QUERY_START, HISTORY)
        )
        last = (history + place)[..., None, None]
        position = torch.arange(seen, device=query.device)
        rows = query[start + place].unflatten(2, (kv_heads, group))
        for head in range(kv_heads):
            logits = (rows[:, :, head] @ keys[head, :seen].T).float().mul_(scale * basis.LOG2E)
            logits.masked_fill_(position > last, float("-inf"))
            most = logits.amax(-1, keepdim=True)
            logits -= most + (logits - most).exp2_().sum(-1, keepdim=True).log2_()
            best = logits.amax((1, 2)).clamp(min=-torch.finfo(torch.float16).max).half()
            for number, (i, line) in enumerate(part):
                scores[i, head, : line[DENSE_START]] = best[number, : line[DENSE_START]]
    return scores


class ExactRanking:
    """By exact probabilities."""

    def score(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        work: WorkList,
        scores: Tensor,
        bounds: Tensor,
        *,
        scale: float,
        side_stream: SideStream,
        overlapped: Callable[[], None],
    ) -> None:
        """See `ranking.rankings.Ranking`."""
        if work.first_of_chunk:
            overlapped()
        if work.max_history == 0:
            return
        found = exact_scores(query, kv_cache, block_table, work, scale=scale)
        scores[: work.num_segments, :, : work.max_history] = found
        chunks = -(-work.max_history // CHUNK)
        padded = torch.nn.functional.pad(found.float(), (0, chunks * CHUNK - work.max_history))
        padded = padded.unflatten(2, (chunks, CHUNK))
        token = torch.arange(chunks * CHUNK, device=found.device).unflatten(0, (chunks, CHUNK))
        inside = token < work.segments[:, DENSE_START, None, None, None]
        own = bounds.unflatten(0, (-1, found.shape[1]))[: work.num_segments, :, :chunks]
        own[..., 0] = padded.masked_fill(~inside, float("-inf")).amax(-1)
        own[..., 1] = padded.masked_fill(~inside, float("inf")).amin(-1)


def choose_exactly(operator: SparsePrefill) -> None:
    """Let an operator choose its lists by :func:`exact_scores`."""
    operator.reference = exact_scores
    if operator.space is not None:
        operator.space = operator.space._replace(ranking=ExactRanking())
