import pytest
import torch

from s2o_vllm.kernels import layout, tuning, work_list
from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists, cut_segments

CPU = torch.device("cpu")
MANY = Limits(1000, 10**7)


def test_segments_are_cut_at_multiples_of_the_sequence():
    row = PrefillRow(row=3, query_start=10, num_queries=70, context=150, budget=0.5)
    assert cut_segments(row, 32, 0) == [
        (3, 10, 10, 150, 150, 75),
        (3, 20, 32, 160, 160, 80),
        (3, 52, 28, 192, 192, 96),
    ]


def test_chunking_does_not_change_whole_segments():
    whole = cut_segments(PrefillRow(0, 0, 128, 64, 0.5), 32, 0)
    parts = cut_segments(PrefillRow(0, 0, 64, 64, 0.5), 32, 0)
    parts += cut_segments(PrefillRow(0, 64, 64, 128, 0.5), 32, 0)
    assert parts == whole


def test_short_history_is_dense_from_token_zero():
    items = cut_segments(PrefillRow(0, 0, 64, 32, 0.5), 32, 64)
    assert items == [(0, 0, 32, 32, 0, 0), (0, 32, 32, 64, 64, 32)]


def test_first_segment_has_no_list_even_without_min_context():
    assert cut_segments(PrefillRow(0, 0, 16, 0, 0.5), 32, 0) == [(0, 0, 16, 0, 0, 0)]


def test_list_never_exceeds_the_budget():
    for budget in (0.01, 0.3, 0.999):
        for item in cut_segments(PrefillRow(0, 0, 1000, 37, budget), 32, 0):
            assert item[layout.LIST_LENGTH] <= budget * item[layout.HISTORY]


def test_a_short_history_gives_its_queries_the_least_tokens_all_the_same():
    row = PrefillRow(0, 0, 256, 32, 0.25, min_tokens=48)
    counts = {item[layout.HISTORY]: item[layout.LIST_LENGTH] for item in cut_segments(row, 32, 0)}
    assert counts == {32: 0, 64: 48, 96: 48, 128: 48, 160: 48, 192: 48, 224: 56, 256: 64}
    assert cut_segments(row, 32, 0)[0] == (0, 0, 32, 32, 0, 0), (
        "no more than that is attended whole"
    )


def test_each_request_has_its_lists_longest_history_first():
    rows = [PrefillRow(4, 0, 40 * 32, 0, 0.5), PrefillRow(1, 1280, 32, 320, 0.5)]
    one, other = build_work_lists(rows, 32, 0, CPU, MANY)
    histories = [item[layout.HISTORY] for item in one.segments.tolist()]
    assert histories == list(range(39 * 32, -1, -32))
    assert one.groups.tolist() == [[0, 16], [16, 16], [32, 8]]
    assert (one.max_history, one.max_list, one.max_queries) == (39 * 32, 39 * 16 * 3 // 2, 32)
    assert (one.row, one.spans) == (4, ((0, 1280, 40 * 32),))
    assert (other.row, other.spans) == (1, ((1280, 32, 352),))


def test_a_chunk_is_one_list_with_a_fit_per_2048_queries():
    rows = [PrefillRow(0, 5, 2176, 1984, 0.5)]  # up to 4,160: fits end at 2,048 and 4,096
    (one,) = build_work_lists(rows, 32, 0, CPU, MANY)
    assert one.spans == ((5, 64, 2048), (69, 2048, 4096), (2117, 64, 4160))
    assert (max(span.queries for span in one.spans), one.max_seen) == (2048, 4160)
    for item in one.segments.tolist():
        (tokens,) = (
            tokens
            for first, queries, tokens in one.spans
            if first <= item[layout.QUERY_START] < first + queries
        )
        assert item[layout.HISTORY] + item[layout.NUM_QUERIES] <= tokens
        assert item[layout.SLOT] == 0
    starts = [item[layout.QUERY_START] for item in one.segments.tolist()]
    assert starts == list(range(5 + 2176 - 32, 4, -32)), "the longest history first"


def test_what_exceeds_the_limits_makes_further_lists_of_the_chunk():
    rows = [PrefillRow(0, 0, 10 * 32, 64, 0.5)]
    by_items = build_work_lists(rows, 32, 0, CPU, Limits(4, 10**6))
    assert [one.num_segments for one in by_items] == [4, 4, 2]
    by_slots = build_work_lists(
        rows, 32, 0, CPU, Limits(100, 2 * work_list.list_capacity(176 * 3 // 2))
    )
    assert by_slots[0].num_segments == 2
    for lists in (by_items, by_slots):
        assert [one.first_of_chunk for one in lists] == [True] + [False] * (len(lists) - 1)
        assert all(one.spans == lists[0].spans for one in lists)
        starts = [item[layout.QUERY_START] for one in lists for item in one.segments.tolist()]
        assert starts == list(range(9 * 32, -1, -32))
    for one in by_slots:
        assert one.num_segments * work_list.list_capacity(
            one.max_list
        ) <= 2 * work_list.list_capacity(176 * 3 // 2)
    alone = build_work_lists(rows, 32, 0, CPU, Limits(100, 1))
    assert [one.num_segments for one in alone] == [1] * 10, "an item that is too long goes alone"


@pytest.mark.parametrize(("shared", "longest"), [(1, 20), (2, 30), (3, 40), (4, 50)])
def test_a_list_may_take_half_of_what_those_have_that_share_with_it(shared, longest):
    rows = [PrefillRow(0, 0, 32, 200, 0.1)]
    (one,) = build_work_lists(rows, 256, 0, CPU, MANY._replace(shared=shared))
    assert one.max_list == work_list.longest_list(one.segments[0].tolist(), shared) == longest
    rows = [PrefillRow(0, 0, 32, 200, 0.9)]
    (one,) = build_work_lists(rows, 256, 0, CPU, MANY._replace(shared=shared))
    assert one.max_list == (180 if shared == 1 else 200), "no list is longer than the history"


def test_lists_that_share_with_more_take_more_room():
    rows = [PrefillRow(0, 0, 10 * 32, 64, 0.1)]
    slots = 4 * work_list.list_capacity(work_list.longest_list((0,) * 4 + (352, 35), 1))
    counts = [
        [one.num_segments for one in build_work_lists(rows, 32, 0, CPU, Limits(100, slots, shared))]
        for shared in (1, 4)
    ]
    assert sum(counts[0]) == sum(counts[1]) == 10
    assert counts[0][0] == 4 > counts[1][0]


def test_what_a_list_tells_of_its_items():
    rows = [PrefillRow(0, 0, 2176, 1984, 0.5)]
    (one,) = build_work_lists(rows, 32, 2016, CPU, MANY)
    assert (one.dense_segments, one.max_dense) == (1, 1984)
    (short,) = build_work_lists(rows, 32, 4096, CPU, MANY)
    assert (short.dense_segments, short.max_dense) == (66, 4064)
    parts = build_work_lists(rows, 32, 2016, CPU, Limits(33, 10**7))
    assert [one.num_segments for one in parts] == [33, 33, 2]
    assert {one.chunk for one in parts} == {(0, 2176, 4160)}


def test_chunks_are_cut_at_multiples_in_the_sequence():
    span = tuning.CHUNK_SPANS * tuning.SPAN_LENGTH
    lists = build_work_lists([PrefillRow(0, 0, span + 64, 32, 0.5)], 64, 0, CPU, MANY)
    assert [one.spans[0].first for one in lists] == [0, span - 32]
    assert all(one.first_of_chunk for one in lists)
    assert all(len(one.spans) <= tuning.CHUNK_SPANS for one in lists)


def test_chunks_of_smaller_spans():
    rows = [PrefillRow(0, 0, 600, 100, 0.5)]
    lists = build_work_lists(rows, 32, 0, CPU, MANY, 64)
    assert [one.spans[0].first for one in lists] == [0, 156, 412]
    assert [one.max_seen for one in lists] == [256, 512, 700]
    assert {one.span_length for one in lists} == {64}


@pytest.mark.parametrize(("segment", "items"), [(0, 1), (-1, 1), (32, 0)])
def test_refuses_sizes_that_are_not_positive(segment, items):
    with pytest.raises(ValueError, match="must be positive"):
        build_work_lists([PrefillRow(0, 0, 1, 0, 0.5)], segment, 0, CPU, Limits(items, 100))
