import json
import math

import pytest
import torch

from models import write_model, write_weights
from s2o_vllm.benchmarks.research import clusters
from s2o_vllm.kernels.layout import DENSE_START, NUM_COUNTERS, NUM_QUERIES, QUERY_START
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.selection.reference import select
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists

CPU = torch.device("cpu")
KINDS, DIM = 8, 64


def like_lines(tokens=1600):
    """Return keys, values [2, tokens, DIM]: a token in KINDS is of a kind, whose values differ."""
    torch.manual_seed(0)
    kind = torch.arange(tokens) % KINDS
    keys = 3 * torch.randn(2, KINDS, DIM)[:, kind] + 0.3 * torch.randn(2, tokens, DIM)
    values = torch.randn(2, KINDS, DIM)[:, kind] + torch.randn(2, tokens, DIM)
    return keys, values, kind


@pytest.mark.parametrize("passes", [1, 4])
def test_tokens_of_a_kind_are_together(passes):
    keys, values, kind = like_lines()
    found = clusters.cluster(keys, values, 40, passes)
    assert found.sizes.sum(1).tolist() == [1600, 1600]
    for head in range(2):
        for number in range(40):
            inside = found.labels[head] == number
            assert int(inside.sum()) == found.sizes[head, number]
            assert kind[inside].unique().numel() <= 1
            if inside.any():
                mean = torch.cat([keys[head, inside], values[head, inside]], -1).mean(0)
                torch.testing.assert_close(found.means[head, number], mean)
    within = keys - found.means[..., :DIM].gather(1, found.labels[..., None].expand_as(keys))
    torch.testing.assert_close(found.key_covariance, within.mT @ within / 1600)


def test_a_history_of_no_tokens_has_no_clusters():
    none = torch.zeros(2, 0, DIM)
    found = clusters.cluster(none, none)
    assert found.means.shape == (2, 0, 2 * DIM)
    assert found.labels.shape == (2, 0)


def attended(keys, values, query, budget, start=1024):
    """Return outputs with clusters and with regions, dense ones, and which rows have a list."""
    tokens = keys.shape[1]
    cache = torch.cat([keys, values], -1).unflatten(1, (-1, 16)).transpose(0, 1).contiguous()
    table = torch.arange(tokens // 16, dtype=torch.int32)[None]
    part = query[:, start:].transpose(0, 1).contiguous()
    shape = Shape(4, 2, DIM, tokens, 1024, 64, "low_rank")
    operator = SparsePrefill(shape, torch.float32, CPU, scale=DIM**-0.5)
    row = PrefillRow(0, 0, tokens - start, start, budget)
    (work,) = build_work_lists([row], 64, 0, CPU, Limits(tokens, tokens * tokens))
    outs = [torch.full_like(part, math.nan) for _ in range(2)]
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    operator(part, cache, table, work, outs[1], counters)
    scores = operator.reference(part, cache, table, work, scale=operator.scale)
    lists = select(scores, table, work, 16, operator.tiers)
    groups = clusters.cluster(keys[:, :start], values[:, :start])
    clusters.attend(
        part, keys, values, work, lists, groups, outs[0], scale=operator.scale, region=128
    )
    dense = clusters.dense(query, keys, values, torch.arange(start, tokens), operator.scale)
    return (*outs, dense, work)


def test_a_budget_of_nearly_everything_is_nearly_dense_attention():
    keys, values, _ = like_lines()
    out, _, dense, work = attended(keys, values, torch.randn(4, 1600, DIM), 0.99)
    assert all(line[DENSE_START] > 0 for line in work.segments.tolist())
    assert (out - dense).norm() / dense.norm() < 0.03


def test_clusters_stand_for_a_kind_that_a_list_has_no_room_for():
    """Queries look at one kind of tokens: more than a list holds, in every region alike."""
    keys, values, kind = like_lines()
    wanted = keys[:, kind == 3].mean(1)
    query = 2 * wanted.repeat_interleave(2, 0)[:, None] + 0.1 * torch.randn(4, 1600, DIM)
    out, regions, dense, _ = attended(keys, values, query, 0.02)
    assert out.isfinite().all()
    assert (out - dense).norm() < 0.7 * (regions - dense).norm()


def test_rows_of_a_short_last_segment_are_all_written():
    keys, values, _ = like_lines(1616)
    out, _, dense, work = attended(keys, values, torch.randn(4, 1616, DIM), 0.3)
    last = max(work.segments.tolist(), key=lambda line: line[QUERY_START])
    assert last[NUM_QUERIES] == 16
    assert (out - dense)[-16:].norm() / dense[-16:].norm() < 0.6


def test_the_command_compares_with_what_serves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clusters, "PREFILL_CHUNK", 512)
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_model(folder)
    write_weights(folder)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + n * n % 90}" for n in range(1400)))
    out = tmp_path / "out.json"
    options = ["--layers", "1", "--context", "1024", "--clusters", "16", "--passes", "1", "2"]
    options += ["--min-budget-tokens", "64", "--segments", "3", "--cache", str(tmp_path)]
    assert clusters.main([str(folder), str(text), *options, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["summaries"] for row in rows] == [
        "regions", "16 clusters, 1 passes", "16 clusters, 2 passes"
    ]  # fmt: skip
    assert all(0 < row["error"] < 2 and row["queries"] == 192 for row in rows)
    assert capsys.readouterr().out.count("words layer 1") == 3
    with pytest.raises(SystemExit, match="must be above 512"):
        clusters.main([str(folder), str(text), *options, "--context", "500"])
