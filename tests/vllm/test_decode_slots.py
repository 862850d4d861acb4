"""Which requests decode sparsely: slots on the host, and what a step plans for them."""

from types import SimpleNamespace

import pytest
import torch

from s2o_vllm import compat, metrics
from s2o_vllm.config import S2OConfig
from s2o_vllm.decode_slots import NO_STATE, DecodeSlots
from s2o_vllm.kernels.decode_state import DecodeRow, DecodeShape
from s2o_vllm.kernels.tuning import SNAPSHOT_QUERIES
from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists
from s2o_vllm.metadata import SparseBuilder
from s2o_vllm.requests import RequestBudget
from s2o_vllm.step_plan import DENSE_TAIL

SETTINGS = S2OConfig(
    sparsity_budget=0.1, min_context=100, segment_size=64,
    decode_budget=0.2, decode_min_context=500, decode_requests=2,
)  # fmt: skip


SHAPE = DecodeShape(4, 2, 64, 2048, SETTINGS.decode_requests, SETTINGS.decode_budget)


def slots_with(*alive):
    return DecodeSlots(SETTINGS, set(alive).__contains__)


def test_a_slot_is_taken_kept_and_taken_again_when_its_request_is_gone():
    alive = {"a", "b", "c"}
    slots = DecodeSlots(SETTINGS, alive.__contains__)
    assert [slots.take(name, 600) for name in "abc"] == [0, 1, None], "there are two"
    assert [slots.of(name) for name in "abc"] == [0, 1, None]
    assert slots.take("b", 700) == 1, "a prompt that is computed again fills its own slot again"
    alive.remove("a")
    assert slots.of("a") == 0, "a preempted request finds it when it comes back"
    assert slots.take("c", 600) == 0
    assert slots.of("a") is None


def step(slots, *rows):
    """rows: (queries, total, prefilling, budget, name)."""
    starts = [0]
    for queries, *_ in rows:
        starts.append(starts[-1] + queries)
    totals, prefilling, budgets, names = ([row[i] for row in rows] for i in (1, 2, 3, 4))
    spending = [RequestBudget(budget, 0.0, 600) for budget in budgets]
    return slots.step(starts, totals, prefilling, spending, names)


def test_rows_that_decode_sparsely():
    slots = slots_with("a", "b", "c")
    slots.take("a", 550)
    slots.take("b", 590)
    rows, reasons = step(
        slots,
        (1, 601, False, 0.1, "a"),
        (1, 601, True, 0.1, "a"),  # the last token of a prompt
        (2, 602, False, 0.1, "a"),  # drafts
        (1, 601, False, 1.0, "a"),  # its own off switch
        (1, 400, False, 0.1, "a"),  # as fast dense
        (1, 580, False, 0.1, "b"),  # not so long as what its slot covers
        (1, 601, False, 0.1, "c"),  # no slot
        (1, 601, False, 0.1, None),  # padding, or a request that nobody knows
        (1, 900, False, 0.1, "b"),
    )
    assert rows == [DecodeRow(0, 0, 600, 0, 550), DecodeRow(8, 9, 899, 1, 590)]
    assert reasons == 3 * [NO_STATE]
    again, _ = step(slots, (1, 602, False, 0.1, "a"))
    assert again == [DecodeRow(0, 0, 601, 0, 601)], "one token is new"


def kept(slots, *rows, prompt, name="a"):
    """What is kept of the chunks of one row: (context, queries)."""
    found = []
    for context, queries in rows:
        work = build_work_lists(
            [PrefillRow(0, 0, queries, context, 0.1)], 64, 100, torch.device("cpu"),
            Limits(1000, 10**8),
        )  # fmt: skip
        plan = slots.take_snapshots(work, [RequestBudget(0.1, 0.0, prompt)], [name], DENSE_TAIL)
        found += plan.values()
    return found


def test_the_end_of_a_prompt_is_kept():
    slots = slots_with("a")
    prompt = 16384 + 5000 + DENSE_TAIL
    *_, one = kept(slots, (0, 8192), (8192, 8192), (16384, 5000), prompt=prompt)
    assert one == (0, 2, 16384 + 5000, 5000 - 4096)
    assert step(slots, (1, 21449, False, 0.1, "a"))[0][0].covered == 21384


@pytest.mark.parametrize(
    ("queries", "span"), [(2048 + SNAPSHOT_QUERIES, 1), (2048 + 40, 0), (40, 0)]
)
def test_a_basis_of_too_few_queries_is_not_kept_where_there_is_another(queries, span):
    (one,) = kept(slots_with("a"), (16384, queries), prompt=16384 + queries + DENSE_TAIL)
    assert one.span == span
    assert one.tokens == 16384 + (queries if span or queries < 2048 else 2048)


def test_a_short_last_chunk_leaves_what_the_chunk_before_left():
    slots = slots_with("a")
    found = kept(slots, (8192, 8192), (16384, 40), prompt=16384 + 40 + DENSE_TAIL)
    assert [one.tokens for one in found] == [16384]


def test_what_is_not_kept():
    slots = slots_with("a")
    assert kept(slots, (0, 8192), prompt=50_000) == [], "far from the end"
    assert kept(slots, (0, 400), prompt=464) == [], "its decode is dense"
    assert kept(slots, (600, 400), prompt=1064, name=None) == []
    assert kept(slots, (0, 90), prompt=600) == [], "nothing was ranked"
    assert slots.of("a") is None


class ParentBuilder:
    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(common=common, fast_build=fast_build, seq_lens=common.seq_lens)

    def update_block_table(self, metadata, table, slots):
        return SimpleNamespace(**vars(metadata) | {"table": table})


class Builder(SparseBuilder, ParentBuilder):
    s2o = SETTINGS
    s2o_limits = Limits(1000, 10**8)


@pytest.fixture
def builder(monkeypatch):
    """A builder, and the requests of its runner."""
    counters = metrics.WorkerCounters()
    monkeypatch.setattr(metrics, "worker", counters)
    requests = compat.RequestSettings()
    monkeypatch.setattr(compat, "requests", requests)

    def request(prompt):
        return SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args=None), prompt_token_ids=[0] * prompt
        )

    requests.runner_v1 = SimpleNamespace(
        requests={"a": request(1064), "b": request(664)},
        input_batch=SimpleNamespace(req_ids=["a", "b"]),
    )
    builder = Builder()
    builder.decode_sparsely(SHAPE, 8, torch.device("cpu"))
    builder.counters = counters
    return builder


def build(builder, *rows):
    return built(builder, *rows).s2o


def built(builder, *rows):
    """rows: (queries, total, prefilling)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    counts, totals, prefilling = ([row[i] for row in rows] for i in range(3))
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(totals),
        num_reqs=len(rows), num_actual_tokens=sum(counts), max_query_len=max(counts),
        max_seq_len=max(totals), block_table_tensor=torch.zeros(len(rows), 99).int(),
        slot_mapping=torch.arange(sum(counts)), seq_lens_cpu_upper_bound=torch.tensor(totals),
        is_prefilling=torch.tensor([one for one, n in zip(prefilling, counts, strict=True) if n]),
    )  # fmt: skip
    return builder.build(0, common)


def test_a_request_from_its_prompt_to_its_answer(builder):
    plan = build(builder, (1064, 1064, True), (664, 664, True))
    assert sorted(one.slot for one in plan.snapshots.values()) == [0, 1]
    assert plan.decode is None

    metadata = built(builder, (1, 1065, False), (1, 665, False))
    plan = metadata.s2o
    assert (plan.work, plan.snapshots) == ([], {})
    assert [row.covered for row in plan.decode.rows] == [1000, 600]
    assert plan.decode.work.segments[:, 5].tolist() == [int(0.2 * 960), int(0.2 * 576)]
    (part,) = plan.dense
    assert (part.rows, part.tokens) == ((0, 2), (0, 2))
    assert part.metadata.seq_lens.tolist() == [1, 1], "they cost the parent a token each"
    assert metadata.seq_lens.tolist() == [1065, 665], "layers that stay dense see all"

    builder.s2o_slots.take("b", 10_000)  # as if it were another request's state
    plan = build(builder, (1, 1066, False), (1, 666, False))
    assert [row.row for row in plan.decode.rows] == [0]
    assert plan.decode.work.segments[1].tolist() == [0] * 7
    assert plan.dense[0].metadata.seq_lens.tolist() == [1, 666]
    assert builder.counters.totals()["s2o:dense_rows", NO_STATE] == 1


def test_a_graph_of_decode_finds_every_step_where_it_was(builder):
    """Of the same number of rows, whether any of them is sparse or none is."""
    builder.s2o_graphs = True
    captured = build(builder, (1, 1, False), (1, 1, False))
    build(builder, (1064, 1064, True), (664, 664, True))
    replayed = build(builder, (1, 1065, False), (1, 665, False))
    assert (len(captured.decode.rows), len(replayed.decode.rows)) == (0, 2)
    places = [
        [one.decode.work.segments, one.decode.appends, one.dense[0].metadata.seq_lens]
        for one in (captured, replayed)
    ]
    for one, other in zip(*places, strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert one.shape == other.shape
    assert captured.decode.work.segments[:, 5].tolist() == [192, 115], "what the last step wrote"
    build(builder, (1, 300, False), (0, 0, False))
    assert not captured.decode.work.segments.any()
    assert captured.dense[0].metadata.seq_lens.tolist() == [300, 0]


def test_another_group_of_layers_has_the_plan_in_its_own_memory(builder):
    other = Builder()
    other.decode_sparsely(SHAPE, 8, torch.device("cpu"))
    build(builder, (1064, 1064, True), (664, 664, True))
    first = built(builder, (1, 1065, False), (1, 665, True))
    table = torch.ones(2, 99).int()
    updated = other.update_block_table(first, table, torch.arange(2))
    assert updated.s2o.decode.rows == first.s2o.decode.rows
    assert updated.s2o.decode.work.segments.tolist() == first.s2o.decode.work.segments.tolist()
    assert updated.s2o.decode.work.segments.data_ptr() == other.s2o_table.segments.data_ptr()
    lengths = updated.s2o.dense[0].metadata.seq_lens
    assert lengths.tolist() == [1, 665]
    assert lengths.data_ptr() == other.s2o_lengths.data_ptr()
    assert first.s2o.dense[0].metadata.seq_lens.data_ptr() == builder.s2o_lengths.data_ptr()
    assert updated.s2o.dense[0].metadata.table.shape == table.shape


def test_a_step_of_decode_and_prefill(builder):
    build(builder, (1064, 1064, True), (300, 300, True))
    plan = build(builder, (1, 1065, False), (300, 600, True))
    assert [row.row for row in plan.decode.rows] == [0]
    assert [row.row for row in plan.sparse_rows] == [1]
    assert plan.dense == [], "the end of the prompt is yet to come"


def test_without_a_decode_budget_decode_is_the_parents(builder):
    builder.s2o_slots = None
    assert build(builder, (1, 1065, False), (1, 665, False)) is None
    assert builder.counters.totals() == {}


def test_runner_v2_names_rows_by_their_index(monkeypatch):
    requests = compat.RequestSettings()
    monkeypatch.setattr(compat, "requests", requests)
    states = SimpleNamespace(req_id_to_index={"a": 4, "b": 7})
    added = [
        SimpleNamespace(
            req_id=name, sampling_params=None, prompt_token_ids=[0] * 9, prompt_embeds=None
        )
        for name in "ab"
    ]
    runner = SimpleNamespace(req_states=states)
    compat._add_requests_v2(lambda *_: None, runner, SimpleNamespace(scheduled_new_reqs=added))
    common = SimpleNamespace(req_idx=[7, 4, 9])
    names = [one.name for one in requests.of_rows(common, 4)]
    assert names == ["b", "a", None, None]
    del states.req_id_to_index["b"]  # finished, or preempted
    assert [one.name for one in requests.of_rows(common, 2)] == [None, "a"]
    assert not requests.alive("b")
