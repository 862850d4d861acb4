import json
import math

import pytest
import torch

from models import write_model, write_weights
from s2o_vllm.benchmarks.research import clusters
from s2o_vllm.kernels.attention import reference
from s2o_vllm.kernels.layout import DENSE_START, NUM_COUNTERS, NUM_QUERIES, QUERY_START
from s2o_vllm.kernels.prefill import SparsePrefill
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
    found = reference.cluster(keys, values, 1600, torch.float32, 40, passes=passes)
    assert found.sizes[0].sum(1).tolist() == [1600, 1600]
    for head in range(2):
        for number in range(40):
            inside = found.labels[0, head] == number
            assert int(inside.sum()) == found.sizes[0, head, number]
            assert kind[inside].unique().numel() <= 1
            if inside.any():
                mean = torch.cat([keys[head, inside], values[head, inside]], -1).mean(0)
                torch.testing.assert_close(found.means[0, head, number], mean)


def attended(keys, values, query, budget, span, start=1024):
    """Return an output, the dense one, and the work; a short span makes clusters, not regions."""
    tokens = keys.shape[1]
    cache = torch.cat([keys, values], -1).unflatten(1, (-1, 16)).transpose(0, 1).contiguous()
    table = torch.arange(tokens // 16, dtype=torch.int32)[None]
    part = query[:, start:].transpose(0, 1).contiguous()
    shape = Shape(4, 2, DIM, tokens, 1024, 64, "low_rank")
    operator = SparsePrefill(shape, torch.float32, CPU, scale=DIM**-0.5)
    row = PrefillRow(0, 0, tokens - start, start, budget)
    limits = Limits(tokens, tokens * tokens)
    lists = build_work_lists([row], 64, 0, CPU, limits, span)
    out = torch.full_like(part, math.nan)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    for work in lists:
        operator(part, cache, table, work, out, counters)
    dense = clusters.dense(query, keys, values, torch.arange(start, tokens), operator.scale)
    return out, dense, lists


def test_a_budget_of_nearly_everything_is_nearly_dense_attention():
    keys, values, _ = like_lines()
    out, dense, lists = attended(keys, values, torch.randn(4, 1600, DIM), 0.99, 64)
    assert all(line[DENSE_START] > 0 for work in lists for line in work.segments.tolist())
    assert (out - dense).norm() / dense.norm() < 0.03


def test_clusters_stand_for_a_kind_that_a_list_has_no_room_for():
    """Queries look at one kind of tokens: more than a list holds, in every region alike."""
    keys, values, kind = like_lines()
    wanted = keys[:, kind == 3].mean(1)
    query = 2 * wanted.repeat_interleave(2, 0)[:, None] + 0.1 * torch.randn(4, 1600, DIM)
    (out, dense, _), (regions, *_) = (attended(keys, values, query, 0.02, s) for s in (64, 2048))
    assert out.isfinite().all()
    assert (out - dense).norm() < 0.7 * (regions - dense).norm()


def test_rows_of_a_short_last_segment_are_all_written():
    keys, values, _ = like_lines(1616)
    out, dense, lists = attended(keys, values, torch.randn(4, 1616, DIM), 0.3, 64)
    last = max((x for w in lists for x in w.segments.tolist()), key=lambda x: x[QUERY_START])
    assert last[NUM_QUERIES] == 16
    assert (out - dense)[-16:].norm() / dense[-16:].norm() < 0.6


def test_the_command_writes_a_row_for_each_number(tmp_path, monkeypatch, capsys):
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
    assert [(row["clusters"], row["passes"]) for row in rows] == [(16, 1), (16, 2)]
    assert all(0 < row["error"] < 2 and row["queries"] == 192 for row in rows)
    assert capsys.readouterr().out.count("words layer 1") == 2
    with pytest.raises(SystemExit, match="must be above 512"):
        clusters.main([str(folder), str(text), *options, "--context", "500"])
