"""Which requests decode sparsely: slots on the host, and what a step plans for them."""

from types import SimpleNamespace

import pytest
import torch

from s2o_vllm import compat, metrics
from s2o_vllm.config import S2OConfig, Spending
from s2o_vllm.decode import NO_STATE, DecodeSlots
from s2o_vllm.kernels.decode_plan import KEPT_QUERIES, DecodeRow
from s2o_vllm.kernels.plan import Limits, PrefillRow, build_work_lists
from s2o_vllm.metadata import DENSE_TAIL, SparseBuilder

SETTINGS = S2OConfig(
    sparsity_budget=0.1, min_context=100, segment_size=64,
    decode_budget=0.2, decode_min_context=500, decode_requests=2,
)  # fmt: skip


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
    spending = [Spending(budget, 0.0, 600) for budget in budgets]
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
        plan = slots.keep(work, [Spending(0.1, 0.0, prompt)], [name], DENSE_TAIL)
        found += plan.values()
    return found


def test_the_end_of_a_prompt_is_kept():
    slots = slots_with("a")
    prompt = 16384 + 5000 + DENSE_TAIL
    *_, one = kept(slots, (0, 8192), (8192, 8192), (16384, 5000), prompt=prompt)
    assert one == (0, 2, 16384 + 5000, 5000 - 4096)
    assert step(slots, (1, 21449, False, 0.1, "a"))[0][0].covered == 21384


@pytest.mark.parametrize(("queries", "fit"), [(2048 + KEPT_QUERIES, 1), (2048 + 40, 0), (40, 0)])
def test_a_basis_of_too_few_queries_is_not_kept_where_there_is_another(queries, fit):
    (one,) = kept(slots_with("a"), (16384, queries), prompt=16384 + queries + DENSE_TAIL)
    assert one.fit == fit
    assert one.tokens == 16384 + (queries if fit or queries < 2048 else 2048)


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
        return SimpleNamespace(common=common, fast_build=fast_build)


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
    builder.s2o_slots = DecodeSlots(SETTINGS, requests.alive)
    builder.counters = counters
    return builder


def build(builder, *rows):
    """rows: (queries, total, prefilling)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    counts, totals, prefilling = ([row[i] for row in rows] for i in range(3))
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(totals),
        num_reqs=len(rows), num_actual_tokens=sum(counts), max_query_len=max(counts),
        max_seq_len=max(totals), block_table_tensor=torch.zeros(len(rows), 99).int(),
        slot_mapping=torch.arange(sum(counts)), seq_lens_cpu_upper_bound=torch.tensor(totals),
        is_prefilling=torch.tensor(prefilling),
    )  # fmt: skip
    return builder.build(0, common).s2o


def test_a_request_from_its_prompt_to_its_answer(builder):
    plan = build(builder, (1064, 1064, True), (664, 664, True))
    assert sorted(one.slot for one in plan.kept.values()) == [0, 1]
    assert plan.decode is None

    plan = build(builder, (1, 1065, False), (1, 665, False))
    assert (plan.work, plan.dense, plan.kept) == ([], [], {})
    assert [row.covered for row in plan.decode.rows] == [1000, 600]
    assert plan.decode.work.items[:, 5].tolist() == [int(0.2 * 960), int(0.2 * 576)]

    builder.s2o_slots.take("b", 10_000)  # as if it were another request's state
    plan = build(builder, (1, 1066, False), (1, 666, False))
    assert [row.row for row in plan.decode.rows] == [0]
    assert [part.rows for part in plan.dense] == [(1, 2)]
    assert builder.counters.totals()["s2o:dense_rows", NO_STATE] == 1


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
    assert requests.names_of_rows(common, 4) == ["b", "a", None, None]
    del states.req_id_to_index["b"]  # finished, or preempted
    assert requests.names_of_rows(common, 2) == [None, "a"]
    assert not requests.alive("b")
