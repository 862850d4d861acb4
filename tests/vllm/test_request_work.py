"""The share of its dense work that a prompt is prefilled with."""

import pytest

from s2o_vllm import metrics, request_work
from s2o_vllm.kernels.work_list import PrefillRow
from s2o_vllm.request_work import RequestWork, left_out, skipped_work
from s2o_vllm.requests import PADDING, RequestInfo


@pytest.fixture
def shares(monkeypatch):
    """The shares that are counted."""
    found = []
    worker = metrics.WorkerCounters()
    monkeypatch.setattr(worker, "observe_share", found.append)
    monkeypatch.setattr(metrics, "worker", worker)
    return found


def test_what_a_chunk_leaves_out():
    """Segments of 64 queries from 1,000 tokens of history on, each without 90 % of its own."""
    row = PrefillRow(0, 0, 1024, 512, 0.1)
    sparse = range(1024, 1536, 64)
    assert skipped_work(row, 64, 1000) == sum(64 * (n - int(0.1 * n)) for n in sparse)
    assert skipped_work(row._replace(min_tokens=1100), 64, 1000) == sum(
        64 * (n - 1100) for n in sparse if n > 1100
    )
    assert skipped_work(row, 64, 2000) == 0
    assert left_out([row], 64, 1000, 0.5) == {0: 0.5 * skipped_work(row, 64, 1000)}


def chunk(tracker, names, queries, lengths, skipped=None, prompt=1000, prefilling=None):
    starts = [0]
    for count in queries:
        starts.append(starts[-1] + count)
    asked = [PADDING if name is None else RequestInfo({}, prompt, name) for name in names]
    tracker.step(asked, starts, lengths, prefilling or [True] * len(names), skipped or {})


def test_a_prompts_chunks_are_added_up(shares):
    tracker = RequestWork()
    chunk(tracker, ["a", "b", None], [500, 600, 1], [500, 600, 1])
    assert shares == []
    chunk(tracker, ["b", "a"], [400, 500], [1000, 1000], {0: 100_000.0, 1: 250_250.0})
    assert shares == pytest.approx([1 - 100_000 / 500_500, 0.5])


def test_a_cached_prefix_is_no_work(shares):
    chunk(RequestWork(), ["a"], [100], [1000], {0: 47_525.0})
    assert shares == pytest.approx([1 - 47_525 / 95_050])


def test_cache_groups_count_a_prompt_once(shares):
    tracker = RequestWork()
    for skipped in ({0: 0.0}, {0: 100_000.0}):
        chunk(tracker, ["a"], [500], [500], skipped)
    chunk(tracker, ["a"], [500], [1000])
    assert shares == [1.0]


def test_a_last_token_alone_is_not_waited_for(shares):
    tracker = RequestWork()
    chunk(tracker, ["a"], [999], [999])
    assert shares == [1.0]
    chunk(tracker, ["a"], [1], [1001], prefilling=[False])
    assert (shares, len(tracker._prompts)) == ([1.0], 0)


def test_a_preempted_prompt_begins_anew(shares):
    tracker = RequestWork()
    chunk(tracker, ["a"], [600], [600], {0: 180_000.0})
    chunk(tracker, ["a"], [400], [400])
    chunk(tracker, ["a"], [600], [1000], {0: 100_000.0})
    assert shares == pytest.approx([1 - 100_000 / 500_500])


def test_prompts_whose_clients_leave_do_not_pile_up(shares, monkeypatch):
    monkeypatch.setattr(request_work, "MOST_PROMPTS", 3)
    tracker = RequestWork()
    for number in range(10):
        chunk(tracker, [f"r{number}"], [500], [500])
    assert list(tracker._prompts) == ["r7", "r8", "r9"]
