"""Skipped tokens summarised by clusters of like keys, in plain PyTorch (ours; nothing serves it).

A region of 1,024 neighbours has tokens of many kinds: its mean key is like none of them. Where a
text repeats itself, a head that looks at one kind of token in all of it is lost by such summaries.
Here the tokens of a history, up to the chunk that is prefilled, are clustered by their keys
(k-means from evenly spread keys), whichever their places; the chunk's own whole regions stay
regions. Each counts as one token of its mean key and value, times its tokens *that are not listed*:
a list holds most of a cluster that matters. The covariances are those inside clusters.

``python -m s2o_vllm.benchmarks.research.clusters MODEL TEXT …`` captures layers of a model (see
`s2o eval attention`) and compares with what serves: the error of a layer's output after its output
projection, over that output's variance. ``in_process`` and ``answers`` take ``--summaries
clusters``: what tasks say, before a kernel is written.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2o_vllm.kernels import tuning
from s2o_vllm.kernels.layout import DENSE_START, HISTORY, LIST_LENGTH, NUM_QUERIES, QUERY_START
from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.selection.selected import SelectedTokens
from s2o_vllm.kernels.work_list import WorkList

from ..quality.capture import CaptureSpec, capture, load
from ..result_file import header, save
from . import tuned

CLUSTERS = 248  # with a chunk's eight regions 256: whole tiles
PASSES = 3  # of k-means
SAMPLES = 32768  # tokens that all passes but the last see, at most
VARIANCE = 0.3  # of the scores inside a cluster, in the exponent of its mass
PREFILL_CHUNK = 8192  # tokens
TOGETHER = 16  # segments that are attended to at a time


class Clusters(NamedTuple):
    """Clusters of a history's tokens.

    Attributes:
        means: float32 ``[kv_heads, clusters, 2 * head_dim]``: a mean value follows its mean key.
        sizes: float32 ``[kv_heads, clusters]``, tokens.
        labels: int64 ``[kv_heads, tokens]``: each token's cluster.
        key_covariance: float32 ``[kv_heads, head_dim, head_dim]``, inside clusters.
        value_covariance: likewise, of keys (rows) and values.
    """

    means: Tensor
    sizes: Tensor
    labels: Tensor
    key_covariance: Tensor
    value_covariance: Tensor


def nearest(keys: Tensor, centers: Tensor) -> Tensor:
    """Return the nearest centre of each key: ``[kv_heads, tokens]``."""
    return (keys @ centers.mT - 0.5 * centers.square().sum(-1)[:, None]).argmax(-1)


def means_of(tokens: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return each label's mean ``[kv_heads, count, width]`` and number ``[kv_heads, count]``."""
    sums = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
    sums.scatter_add_(1, labels[..., None].expand_as(tokens), tokens)
    sizes = tokens.new_zeros(sums.shape[:2])
    sizes.scatter_add_(1, labels, tokens.new_ones(labels.shape))
    return sums / sizes.clamp(min=1)[..., None], sizes


def cluster(keys: Tensor, values: Tensor, count: int = CLUSTERS, passes: int = PASSES) -> Clusters:
    """Cluster the tokens of a history by their keys.

    Args:
        keys: float32 ``[kv_heads, tokens, head_dim]``.
        values: likewise.
        count: most clusters; never more than tokens.
        passes: assignments of tokens to clusters, the last one of all tokens.
    """
    tokens, head_dim = keys.shape[1:]
    count = min(count, tokens)
    if tokens == 0:  # of a prompt's first chunk
        empty = keys.new_zeros(keys.shape[0], 0, 2 * head_dim)
        covariance = keys.new_zeros(keys.shape[0], head_dim, head_dim)
        labels = torch.zeros(keys.shape[:2], dtype=torch.long, device=keys.device)
        return Clusters(empty, empty[..., 0], labels, covariance, covariance)
    centers = keys[:, stratified(tokens, tokens // count)[:count].to(keys.device)]
    sample = keys[:, stratified(tokens, -(-tokens // SAMPLES)).to(keys.device)]
    for _ in range(passes - 1):
        new, sizes = means_of(sample, nearest(sample, centers), count)
        centers = torch.where(sizes[..., None] > 0, new, centers)
    labels = nearest(keys, centers)
    both = torch.cat([keys, values], -1)
    means, sizes = means_of(both, labels, count)
    both = both - means.gather(1, labels[..., None].expand_as(both))
    covariance = both[..., :head_dim].mT @ both / tokens
    return Clusters(means, sizes, labels, covariance[..., :head_dim], covariance[..., head_dim:])


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: WorkList,
    lists: SelectedTokens,
    clusters: Clusters,
    out: Tensor,
    *,
    scale: float,
    region: int = tuning.REGION_TOKENS,
) -> None:
    """Attend to every segment that has a list: to itself, to its list and to what is skipped.

    Args:
        query: ``[tokens, heads, head_dim]``, of the chunk.
        keys: ``[kv_heads, >= tokens seen, head_dim]``.
        values: likewise.
        work: the chunk's segments.
        lists: theirs; slots are positions in the sequence.
        clusters: of the history before the chunk.
        out: like ``query``; rows of segments without a list are left alone.
        scale: softmax scale.
        region: tokens of the chunk's own regions.
    """
    segments = [
        (i, line)
        for i, line in enumerate(work.segments.tolist())
        if line[LIST_LENGTH] > 0 and line[DENSE_START] > 0
    ]
    start = clusters.labels.shape[1]
    regions = max((line[DENSE_START] - start) // region for _, line in segments) if segments else 0
    both = torch.cat([keys, values], -1).float()
    own = both[:, start : start + regions * region].unflatten(1, (regions, region)).mean(2)
    means = torch.cat([clusters.means, own], 1)
    place = torch.arange(both.shape[1] - start, device=both.device)
    labels = clusters.means.shape[1] + (place // region).clamp(max=regions)
    labels = torch.cat([clusters.labels, labels.expand(both.shape[0], -1)], 1)
    for first in range(0, len(segments), TOGETHER):
        part = segments[first : first + TOGETHER]
        _attend_part(query, both, part, lists, clusters, means, labels, out, scale, region)


def _attend_part(
    query: Tensor,
    both: Tensor,
    part: Sequence[tuple[int, list[int]]],
    lists: SelectedTokens,
    clusters: Clusters,
    means: Tensor,
    labels: Tensor,
    out: Tensor,
    scale: float,
    region: int,
) -> None:
    """Attend to some segments, see :func:`attend`; ``labels`` name the rows of ``means``."""
    device, (kv_heads, summaries, width) = query.device, means.shape
    group, head_dim = query.shape[1] // kv_heads, width // 2
    start = clusters.labels.shape[1]
    number = torch.tensor([i for i, _ in part], device=device)
    history, count, begin = (
        torch.tensor([line[column] for _, line in part], device=device)
        for column in (HISTORY, NUM_QUERIES, QUERY_START)
    )
    own = torch.arange(int(count.max()), device=device)
    # A short segment repeats its last query.
    place = torch.minimum(own, count[:, None] - 1)
    q = query[begin[:, None] + place].float().unflatten(2, (kv_heads, group))
    q = q.permute(0, 2, 1, 3, 4).flatten(2, 3)  # [segments, kv_heads, queries * group, head_dim]

    lengths = lists.lengths[number]
    listed = torch.arange(int(lengths.max()), device=device)
    inside = listed < lengths[..., None]
    slots = lists.slots[number, :, : len(listed)].long().masked_fill(~inside, 0)
    head = torch.arange(kv_heads, device=device)
    tokens = both[head[:, None], slots]  # [segments, kv_heads, listed, width]
    self_tokens = both[:, history[:, None] + place].transpose(0, 1)

    size = torch.arange(summaries - clusters.means.shape[1], device=device)
    whole = (start + (size + 1) * region <= history[:, None]) * float(region)
    sizes = torch.cat(
        [clusters.sizes.expand(len(part), -1, -1), whole[:, None].expand(-1, kv_heads, -1)], -1
    )
    taken = sizes.new_zeros(len(part), kv_heads, summaries + 1)
    taken.scatter_add_(2, labels[head[:, None], slots], inside.float())
    left = ((sizes - taken[..., :-1]) * (1 - tuning.SAMPLE_SHARE)).clamp(min=0)

    s_own = q @ self_tokens[..., :head_dim].mT * scale
    later = own > place.repeat_interleave(group, 1)[..., None]
    s_own = s_own.masked_fill(later[:, None], -math.inf)
    s_list = q @ tokens[..., :head_dim].mT * scale
    s_list += lists.weights[number, :, : len(listed)].float()[:, :, None] * math.log(2)
    s_list = s_list.masked_fill(~inside[:, :, None], -math.inf)
    variance = ((q @ clusters.key_covariance) * q).sum(-1, keepdim=True).clamp(min=0) * scale**2
    mass = (VARIANCE * variance).clamp(max=math.log(tuning.REGION_WEIGHT_LIMIT))
    s_mean = q @ means[..., :head_dim].mT * scale + left.log()[:, :, None] + mass
    p = torch.cat([s_own, s_list, s_mean], -1).softmax(-1)
    p_own, p_list, p_mean = p.split([s_own.shape[3], s_list.shape[3], summaries], -1)
    result = p_own @ self_tokens[..., head_dim:]
    result += p_list @ tokens[..., head_dim:] + p_mean @ means[..., head_dim:]
    moved = q * (scale * tuning.COVARIANCE_WEIGHT) * p_mean.sum(-1, keepdim=True)
    result += moved @ clusters.value_covariance
    result = result.unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    for one, (_, line) in zip(result, part, strict=True):
        rows = slice(line[QUERY_START], line[QUERY_START] + line[NUM_QUERIES])
        out[rows] = one[: line[NUM_QUERIES]].to(out.dtype)


def projection(model: Path, layer: int) -> Tensor:
    """Return a layer's output projection, float32 ``[width, heads * head_dim]``.

    Raises:
        SystemExit: if the model's files hold none of that name.
    """
    from safetensors import safe_open

    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  it is no mapping
                return tensors.get_tensor(name).float()
    raise SystemExit(f"clusters: {model} holds no {name}")


def dense(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return causal attention of some positions: ``[positions, heads, head_dim]``."""
    group = query.shape[0] // keys.shape[0]
    later = torch.arange(keys.shape[1], device=keys.device) > positions[:, None]
    return torch.stack(
        [
            ((one[positions] @ keys[head // group].T) * scale)
            .masked_fill(later, -math.inf)
            .softmax(-1)
            @ values[head // group]
            for head, one in enumerate(query)
        ],
        1,
    )


def judge(args: argparse.Namespace, spec: CaptureSpec, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the error of what serves, and of each number of clusters and passes, of a layer."""
    from s2o_vllm.kernels.attention import reference
    from s2o_vllm.kernels.layout import NUM_COUNTERS
    from s2o_vllm.kernels.prefill import SparsePrefill
    from s2o_vllm.kernels.selection import reference as selection
    from s2o_vllm.kernels.shape import Shape
    from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists

    data = load(spec, args.cache, layer, args.device)
    query, keys, values = data.q.float(), data.k.float(), data.v.float()
    heads, context, head_dim = query.shape
    kv_heads, page, start = keys.shape[0], 16, (context - 1) // PREFILL_CHUNK * PREFILL_CHUNK
    if start == 0:
        raise SystemExit(f"clusters: --context is {context}, must be above {PREFILL_CHUNK}")
    pages = -(-context // page)
    cache = keys.new_zeros(kv_heads, pages * page, 2 * head_dim)
    cache[:, :context] = torch.cat([keys, values], -1)
    cache = cache.unflatten(1, (pages, page)).transpose(0, 1).contiguous()
    table = torch.arange(pages, dtype=torch.int32, device=query.device)[None]
    part = query[:, start : start + PREFILL_CHUNK].transpose(0, 1).contiguous()
    shape = Shape(heads, kv_heads, head_dim, context, PREFILL_CHUNK, 64, "low_rank")
    operator = SparsePrefill(shape, torch.float32, torch.device("cpu"), scale=data.scale)
    row = PrefillRow(0, 0, part.shape[0], start, args.budget, min_tokens=args.min_budget_tokens)
    limits = Limits(context, context * context)  # whatever the budget, one list
    (work,) = build_work_lists([row], 64, 0, query.device, limits)
    scores = operator.reference(part, cache, table, work, scale=data.scale)
    chosen = torch.linspace(0, work.num_segments - 1, args.segments).long()
    work = replace(work, segments=work.segments[chosen])
    lists = selection.select(scores[chosen], table, work, page, tuning.TIERS_UNORDERED)
    rows = torch.cat(
        [torch.arange(line[QUERY_START], line[QUERY_START] + line[NUM_QUERIES])
         for line in work.segments.tolist()]
    )  # fmt: skip
    exact = dense(query, keys, values, rows + start, data.scale)
    weight = projection(args.model, layer)
    variance = (exact.flatten(1) @ weight.T).var(0).sum()

    def found(out: Tensor, what: str) -> dict[str, Any]:
        lost = ((out[rows] - exact).flatten(1) @ weight.T).square().sum(1) / variance
        return {
            "model": args.model.name, "text": spec.text.stem, "context": context, "layer": layer,
            "summaries": what, "tuned": dict(tuned.CHANGED), "queries": len(rows),
            "list": round(float(lists.lengths.float().mean()), 1),
            "error": round(float(lost.mean()), 5),
            "rows_above_0.3": round(float((lost > 0.3).float().mean()), 4),
        }  # fmt: skip

    out, counters = torch.full_like(part, math.nan), torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    summaries = reference.summarise(cache, table, work, torch.bfloat16)
    reference.attend(
        part, cache, table, work, lists, summaries, out, counters, scale=data.scale,
        queries_per_tile=64,
    )  # fmt: skip
    yield found(out, "regions")
    for count in args.clusters:
        for passes in args.passes:
            out.fill_(math.nan)
            groups = cluster(keys[:, :start], values[:, :start], count, passes)
            attend(part, keys, values, work, lists, groups, out, scale=data.scale)
            yield found(out, f"{count} clusters, {passes} passes")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.research.clusters", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files")
    add("--context", type=int, default=16384, metavar="TOKENS")
    add("--layers", type=int, nargs="+", required=True, metavar="N")
    add("--clusters", type=int, nargs="+", default=[CLUSTERS], metavar="N")
    add("--passes", type=int, nargs="+", default=[PASSES], metavar="N")
    add("--budget", type=float, default=0.0125, metavar="B")
    add("--min-budget-tokens", type=int, default=512, metavar="TOKENS")
    add("--segments", type=int, default=12, metavar="N", help="of the last chunk, evenly spread")
    add("--cache", type=Path, default=Path(".cache/captures"), metavar="DIR")
    add("--device", default="cpu", help="that the model runs on")
    add("--out", type=Path, default=Path("benchmarks/results/quality_clusters.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    for text in args.texts:
        spec = CaptureSpec(args.model, text, args.context, tuple(args.layers))
        capture(spec, args.cache, args.device)
        for layer in args.layers:
            for row in judge(args, spec, layer):
                rows.append(row)
                save(args.out, header(), rows)
                print(
                    f"{row['text']} layer {layer}, {row['summaries']}: error {row['error']:.4f}, "
                    f"{row['rows_above_0.3']:.1%} of rows above 0.3, lists of {row['list']:.0f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
