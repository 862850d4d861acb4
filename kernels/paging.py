"""Read a paged cache and packed queries in plain PyTorch, for the references."""

import torch

from .layout import NUM_QUERIES, QUERY_START


def physical_slots(positions: torch.Tensor, table_row: torch.Tensor, page: int) -> torch.Tensor:
    """Translate token positions of one request to physical slots: block * block_size + offset.

    Args:
        positions: integer, any shape.
        table_row: int32 ``[max_blocks]``, the request's row of the block table.
        page: tokens of a block.

    Returns:
        int64 of the shape of ``positions``.
    """
    return table_row[positions // page].long() * page + positions % page


def load_tokens(
    kv_cache: torch.Tensor, slots: torch.Tensor, head_dim: int, heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather tokens from the paged cache.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        slots: integer ``[n]`` (the same for all heads) or ``[heads, n]``.
        head_dim: size of a head.
        heads: a multiple of kv_heads, whose neighbours share a KV head; None for kv_heads.

    Returns:
        Keys and values, each ``[heads, n, head_dim]`` in float32 and units of the cache.
    """
    page, heads = kv_cache.shape[2], heads or kv_cache.shape[1]
    slots = slots.long().expand(heads, -1)
    head = torch.arange(heads, device=slots.device)[:, None] * kv_cache.shape[1] // heads
    rows = (slots // page * kv_cache.shape[1] + head) * page + slots % page
    # Whole rows of a flat cache: an index for each dimension takes ten times as long.
    flat = kv_cache.flatten(0, 2).index_select(0, rows.flatten())
    tokens = flat.float().unflatten(0, rows.shape)
    return tokens[..., :head_dim], tokens[..., head_dim:]


def segment_queries(query: torch.Tensor, line: list[int], kv_heads: int) -> torch.Tensor:
    """Return a segment's queries as float32 ``[kv_heads, group, queries, head_dim]``."""
    start, count = line[QUERY_START], line[NUM_QUERIES]
    part = query[start : start + count].float()
    return part.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
