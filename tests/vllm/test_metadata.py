from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2o_vllm import compat, metrics, request_work, support
from s2o_vllm.config import S2OConfig
from s2o_vllm.forward import SparseImpl
from s2o_vllm.kernels.work_list import Limits
from s2o_vllm.metadata import SparseBuilder
from s2o_vllm.requests import RequestBudget, RequestInfo
from s2o_vllm.step_plan import dense_work, split_rows


def split(rows, min_context=100):
    """rows: (queries, total, prefilling, budget) and, where it is known, the prompt's length."""
    starts = [0]
    for queries, *_ in rows:
        starts.append(starts[-1] + queries)
    totals, prefilling, budgets = ([row[i] for row in rows] for i in (1, 2, 3))
    spending = [
        RequestBudget(budget, 0.02, *row[4:]) for budget, row in zip(budgets, rows, strict=True)
    ]
    return split_rows(starts, totals, prefilling, spending, min_context)


def test_decode_dense_and_sparse_rows_are_told_apart():
    sparse, runs, reasons = split(
        [
            (1, 5000, False, 0.1),  # decode
            (1, 5000, True, 0.1),  # the last token of a prompt: as cheap as decode
            (4, 5000, False, 0.1),  # speculative verification
            (64, 5000, True, 0.1),
            (64, 90, True, 0.1),
            (64, 5000, True, 1.0),
            (64, 5000, True, 0.2),
            (0, 0, False, 0.1),  # padding of a graph batch
        ]
    )
    assert [(row.row, row.query_start, row.context, row.budget) for row in sparse] == [
        (3, 6, 4936, 0.1),
        (6, 198, 4936, 0.2),
    ]
    assert {row.target_error for row in sparse} == {0.02}
    assert runs == [(0, 3, 0), (4, 6, 70)]
    assert reasons == ["short_history", "budget_is_one"]


def test_a_history_within_the_least_budget_is_dense():
    spending = [RequestBudget(0.1, 0.0, 0, 1000)]
    assert split_rows([0, 64], [1000], [True], spending, 100)[2] == ["short_history"]
    ((row,), _, reasons) = split_rows([0, 64], [1001], [True], spending, 100)
    assert (row.min_tokens, reasons) == (1000, [])


def test_a_chunk_of_few_new_tokens_is_dense():
    spending = [RequestBudget(0.1, 0.0, 0, 0)] * 2
    arguments = ([0, 63, 127], [1063, 1064], [True, True], spending, 100, ())
    sparse, runs, reasons = split_rows(*arguments, lambda history: 64 * history // 1000)
    assert ([row.row for row in sparse], runs) == ([1], [(0, 1, 0)])
    assert reasons == ["few_new_tokens"]


def test_the_end_of_a_prompt_is_dense():
    """A chunk that ends the prompt leaves its end to the parent, together with rows that follow."""
    sparse, runs, reasons = split(
        [
            (500, 5000, True, 0.1, 5000),
            (500, 4500, True, 0.1, 5000),
            (500, 4950, True, 0.1, 5000),
            (64, 5000, True, 0.1, 5000),
            (90, 5040, True, 0.1, 5000),  # a resumed request, with tokens it had generated
            (500, 5000, True, 0.1),
        ]
    )
    assert [(row.row, row.query_start, row.num_queries, row.context) for row in sparse] == [
        (0, 0, 436, 4500),
        (1, 500, 500, 4000),
        (2, 1000, 486, 4450),
        (5, 1654, 500, 4500),
    ]
    assert runs == [(0, 1, 436), (2, 5, 1486)]
    assert reasons == 2 * ["end_of_prompt"]


def test_a_row_is_sparse_if_any_of_its_segments_can_be():
    assert split([(64, 101, True, 0.1)])[0]
    assert not split([(64, 100, True, 0.1)])[0]


def test_every_token_is_attended_exactly_once():
    generator = np.random.default_rng()
    rows = [
        (int(q), int(q + c), bool(p), float(b), int(q + c + more))
        for q, c, p, b, more in zip(
            generator.integers(0, 80, 50), generator.integers(0, 300, 50),
            generator.integers(0, 2, 50), generator.choice([0.1, 1.0], 50),
            generator.integers(0, 100, 50), strict=True,
        )
    ]  # fmt: skip
    starts = np.cumsum([0, *(row[0] for row in rows)])
    sparse, runs, _ = split(rows)
    owner = np.zeros(starts[-1], int)
    for row in sparse:
        owner[row.query_start : row.query_start + row.num_queries] += 1
    for first, last, start in runs:
        assert starts[first] <= start < starts[first + 1]
        owner[start : starts[last]] += 1
    assert (owner == 1).all()
    # Padding may lie inside a run but never makes one.
    counts = np.diff(starts)
    assert all(counts[first] > 0 and counts[last - 1] > 0 for first, last, _ in runs)


class ParentBuilder:
    supports_update_block_table = True

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(common=common, fast_build=fast_build, block_table=None)

    def update_block_table(self, metadata, blk_table, slot_mapping):
        return SimpleNamespace(**{**vars(metadata), "block_table": blk_table})


class Builder(SparseBuilder, ParentBuilder):
    s2o = S2OConfig(sparsity_budget=0.1, min_context=100, segment_size=64)
    s2o_limits = Limits(2, 10_000)


def common_metadata(counts, totals, prefilling, **changes):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    values = {
        "query_start_loc": starts, "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(totals), "num_reqs": len(counts),
        "num_actual_tokens": int(starts[-1]), "max_query_len": max(counts),
        "max_seq_len": max(totals), "block_table_tensor": torch.zeros(len(counts), 99).int(),
        "slot_mapping": torch.arange(int(starts[-1])),
        "seq_lens_cpu_upper_bound": torch.tensor(totals),
        "is_prefilling": torch.tensor(prefilling),
    }  # fmt: skip
    return CommonAttentionMetadata(**(values | changes))


def test_decode_steps_get_the_parents_metadata_unchanged():
    metadata = Builder().build(0, common_metadata([1, 1], [5000, 80], [False, False]))
    assert metadata.s2o is None
    assert metadata.fast_build is False


def test_a_mixed_step():
    common = common_metadata([1, 130, 50], [900, 1130, 60], [False, True, True])
    metadata = Builder().build(0, common)
    plan = metadata.s2o
    assert [row.row for row in plan.sparse_rows] == [1]
    assert [work.num_segments for work in plan.work] == [2, 1], "cut at 1024 and 1088"
    assert [(part.rows, part.tokens) for part in plan.dense] == [
        ((0, 1), (0, 1)),
        ((2, 3), (131, 181)),
    ]
    last = plan.dense[1].metadata.common
    assert last.query_start_loc.tolist() == [0, 50]
    assert (last.num_reqs, last.num_actual_tokens, last.max_query_len) == (1, 50, 50)
    assert last.seq_lens.tolist() == [60]
    assert last.slot_mapping.tolist() == list(range(131, 181))
    assert plan.dense[1].metadata.fast_build, "a shared schedule buffer must not be overwritten"


def test_another_block_table_reaches_the_dense_parts():
    builder = Builder()
    metadata = builder.build(0, common_metadata([1, 130], [900, 1130], [False, True]))
    table = torch.arange(2 * 99).reshape(2, 99)
    updated = builder.update_block_table(metadata, table, torch.arange(131))
    assert updated.block_table is table
    assert updated.s2o.dense[0].metadata.block_table.tolist() == [table[0].tolist()]
    assert updated.s2o.work is metadata.s2o.work


def test_a_group_that_cannot_go_sparse_counts_why(monkeypatch):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    builder = Builder()
    builder.s2o_reason = "alibi"
    assert builder.build(0, common_metadata([130], [1130], [True])).s2o is None
    assert counters.totals()["s2o:dense_rows", "alibi"] == 1


def group(*dense_layers, rank=0, device="cpu", kind=Builder, **settings):
    """A builder whose group has the layers 0, 1 and 2, on one of two tensor ranks."""
    builder = kind()
    builder.device = torch.device(device)
    asked = {"min_context": 100, "dense_layers": dense_layers, "dense_where_faster": False}
    settings = S2OConfig(**asked | settings)
    builder.vllm_config = SimpleNamespace(
        additional_config={"s2o": settings.as_dict()},
        model_config=SimpleNamespace(served_model_name="a/model"),
        parallel_config=SimpleNamespace(
            rank=rank,
            tensor_parallel_size=2,
            data_parallel_index=1,
            nnodes=1,
            data_parallel_size=1,
            data_parallel_size_local=1,
            data_parallel_external_lb=False,
            data_parallel_hybrid_lb=False,
        ),
    )

    def layer(number):
        impl = SparseImpl.__new__(SparseImpl)
        impl._s2o, impl.s2o_limits, impl.num_heads = settings, Limits(5, 999), 4
        return SimpleNamespace(layer_name=f"model.layers.{number}.self_attn.attn", impl=impl)

    builder.prepare_s2o([layer(number) for number in range(3)])
    return builder


def test_layers_whose_steps_vllm_rewrites_stay_dense(monkeypatch):
    """Of local attention (Llama 4) each chunk of a request is a row: no row is a request there."""
    from vllm.model_executor.layers.attention import chunked_local_attention

    from s2o_vllm.backend_cpu import S2OCPUBackend

    backend = chunked_local_attention.create_chunked_local_attention_backend(S2OCPUBackend, 256)
    assert support.rewrites_steps(backend.get_builder_cls())
    assert not support.rewrites_steps(S2OCPUBackend.get_builder_cls())

    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    rewriting = type("Rewriting", (Builder,), {"__module__": "vllm.somewhere"})
    builder = group(kind=rewriting)
    assert builder.s2o_reason == "local_chunks"
    assert builder.s2o_heads == 0, "local attention counts in no dense work"
    rewritten = common_metadata([130, 70], [1130, 70], [True, True])
    rewritten.is_prefilling = None  # vLLM does not say so of rows that it makes
    assert builder.build(0, rewritten).s2o is None
    assert counters.totals()["s2o:dense_rows", "local_chunks"] == 1, "once a step"
    assert builder.build(0, common_metadata([1], [1130], [False])).s2o is None
    assert counters.totals()["s2o:dense_rows", "local_chunks"] == 1, "not where all decode"


def test_chunks_with_a_dense_layer_go_sparse_in_the_others_and_are_counted(monkeypatch):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    builder = group(0, 2)
    assert builder.s2o_limits == Limits(5, 999)
    assert builder.build(0, common_metadata([130], [1130], [True])).s2o is not None
    assert counters.totals()["s2o:dense_rows", "dense_layer"] == 1
    assert counters.totals()["s2o:sparse_requests", ""] == 1


@pytest.mark.parametrize(
    ("device", "where_faster", "sparse"),
    [("cpu", True, False), ("cpu", False, True), ("cuda", True, False), ("cuda", False, True)],
)
def test_a_short_turn_behind_a_long_history_is_dense_where_that_is_faster(
    monkeypatch, device, where_faster, sparse
):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    monkeypatch.setattr("s2o_vllm.metadata.build_work_lists", lambda *arguments: [])
    builder = group(device=device, dense_where_faster=where_faster)
    plan = builder.build(0, common_metadata([130], [20_130], [True])).s2o
    assert (plan is not None) is sparse
    name = ("s2o:sparse_requests", "") if sparse else ("s2o:dense_rows", "few_new_tokens")
    assert counters.totals()[name] == 1


def test_a_group_of_dense_layers_alone_is_dense(monkeypatch):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    assert group(0, 1, 2).build(0, common_metadata([130], [1130], [True])).s2o is None
    assert counters.totals()["s2o:dense_rows", "dense_layer"] == 1
    assert counters.totals()["s2o:sparse_requests", ""] == 0


# Three layers of four heads, and 130 queries of which the last one sees 1,130 tokens.
WORK = 3 * 4 * sum(range(1001, 1131))


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False), (2, True), (3, False)])
def test_ranks_that_share_a_layers_heads_count_a_chunk_once(monkeypatch, rank, counts):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    plan = group(0, rank=rank).build(0, common_metadata([130], [1130], [True])).s2o
    assert plan is not None
    assert bool(counters.totals()["s2o:sparse_requests", ""]) is counts
    assert counters.totals()["s2o:attention_tokens", ""] == WORK, "of the heads of every rank"
    assert counters._thread is not None, "what its heads visit is published from every rank"
    assert counters._labels == {"model_name": "a/model", "engine": "1"}


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 0)])
def test_one_rank_counts_what_a_prompt_left_out(monkeypatch, rank, count):
    """The first of 130 queries sees 1,001 tokens; one of three layers is dense."""
    shares = []
    worker = metrics.WorkerCounters()
    monkeypatch.setattr(worker, "observe_share", shares.append)
    monkeypatch.setattr(metrics, "worker", worker)
    monkeypatch.setattr(request_work, "tracker", request_work.RequestWork())
    asked = [RequestInfo({}, 1131, "request")]
    monkeypatch.setattr(compat.requests, "of_rows", lambda *_: asked)
    builder = group(0, rank=rank, segment_size=4096)
    builder.build(0, common_metadata([130], [1130], [True]))
    work = 130 * (1001 + 1130) / 2
    # The last 64 tokens of the prompt are dense; the others leave out 90 % of 1,000 tokens.
    skipped = 2 / 3 * (1131 - 64 - 1000) * 900
    assert shares == count * [pytest.approx(1 - skipped / work)]


def test_without_dense_layers_nothing_is_counted_for_them(monkeypatch):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    assert group().build(0, common_metadata([130], [1130], [True])).s2o is not None
    assert counters.totals()["s2o:sparse_requests", ""] == 1
    assert not [name for name, _ in counters.totals() if name == "s2o:dense_rows"]


def test_the_settings_are_logged_once_and_each_reason_at_its_first_chunk(monkeypatch, caplog):
    monkeypatch.setattr(metrics, "worker", metrics.WorkerCounters())
    with caplog.at_level("INFO", "vllm.s2o"):
        for builder in (group(0), group(0), group(0, rank=1)):
            for _ in range(2):
                builder.build(0, common_metadata([130, 50], [1130, 60], [True, True]))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("S2O on: ranking low_rank, budget 0.1, min_budget_tokens 0, target")
    assert sorted(line.rsplit(":", 1)[0] for line in lines[1:]) == [
        "S2O: first chunk on the stock path for dense_layer",
        "S2O: first chunk on the stock path for short_history",
    ]


def test_dense_work_is_the_same_however_a_prompt_is_cut():
    def work(size):
        ends = [min(start + size, 5001) for start in range(0, 5001, size)]
        return sum(
            dense_work([0, end - start], [end], [True])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )

    assert work(5001) == 5001 * 5002 // 2
    assert {work(size) for size in (64, 300, 2048)} == {5001 * 5002 // 2}


def test_decode_counts_as_work_only_where_it_is_sparse():
    starts, lengths = [0, 1, 2, 6, 7], [900, 900, 900, 900]
    assert dense_work(starts, lengths, [False, False, False, True]) == 0
    assert dense_work(starts, lengths, [False, False, False, True], {1}) == 900


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_req_doc_ranges": {0: [(3, 9)]}}, "bidirectional_ranges"),
        ({"rswa_prefix_lens": torch.tensor([5])}, "reference_window"),
    ],
)
def test_steps_that_are_not_plainly_causal_count_why(monkeypatch, changes, reason):
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    common = common_metadata([130], [1130], [True], **changes)
    assert Builder().build(0, common).s2o is None
    assert counters.totals()["s2o:dense_rows", reason] == 1


def test_images_without_ranges_go_sparse():
    common = common_metadata([130], [1130], [True], mm_req_doc_ranges={0: []})
    assert Builder().build(0, common).s2o is not None


@pytest.mark.parametrize("causal", [False, torch.ones(1, dtype=torch.int32)])
def test_attention_that_is_not_causal_is_left_alone(causal):
    assert Builder().build(0, common_metadata([130], [1130], [True], causal=causal)).s2o is None


def test_runner_v2_settings_follow_the_request_index(monkeypatch):
    requests = compat.RequestSettings()
    monkeypatch.setattr(compat, "requests", requests)

    def request(request_id, extra):
        return SimpleNamespace(
            req_id=request_id, sampling_params=SimpleNamespace(extra_args=extra),
            prompt_token_ids=[0] * 300, prompt_embeds=None,
        )  # fmt: skip

    runner = SimpleNamespace(req_states=SimpleNamespace(req_id_to_index={"a": 4, "b": 7, "c": 4}))
    step = SimpleNamespace(
        scheduled_new_reqs=[request("a", {"s2o_sparsity_budget": 0.25}), request("b", None)]
    )
    compat._add_requests_v2(lambda *_: None, runner, step)
    common = SimpleNamespace(req_idx=np.array([7, 4, 9]))
    assert requests.of_rows(common, 3) == [
        ({}, 300, "b"), ({"sparsity_budget": 0.25}, 300, "a"), ({}, 0, None),
    ]  # fmt: skip
    # The slot is reused by a request that asks for nothing.
    compat._add_requests_v2(
        lambda *_: None, runner, SimpleNamespace(scheduled_new_reqs=[request("c", {})])
    )
    assert requests.of_rows(common, 3) == [({}, 300, "b"), ({}, 300, "c"), ({}, 0, None)]


def test_runner_v1_settings_follow_the_batch():
    requests = compat.RequestSettings()
    params = SimpleNamespace(extra_args={"s2o_sparsity_budget": 0.5, "s2o_target_error": 0.1})
    requests.runner_v1 = SimpleNamespace(
        requests={
            "a": SimpleNamespace(
                sampling_params=None, prompt_token_ids=None, prompt_embeds=torch.zeros(7, 2)
            ),
            "b": SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2, 3]),
        },
        input_batch=SimpleNamespace(req_ids=["b", "a"]),
    )
    rows = requests.of_rows(SimpleNamespace(req_idx=None), 3)
    asked = {"sparsity_budget": 0.5, "target_error": 0.1}
    assert rows == [(asked, 3, "b"), ({}, 7, "a"), ({}, 0, None)]
