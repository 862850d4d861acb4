import pytest
import torch

from s2o_vllm.kernels import plan
from s2o_vllm.kernels.plan import PrefillRow, build_work_lists, segments

CPU = torch.device("cpu")


def test_segments_are_cut_at_multiples_of_the_sequence():
    row = PrefillRow(row=3, query_start=10, num_queries=70, context=150, budget=0.5)
    assert segments(row, 32, 0) == [
        (3, 10, 10, 150, 150, 75),
        (3, 20, 32, 160, 160, 80),
        (3, 52, 28, 192, 192, 96),
    ]


def test_chunking_does_not_change_whole_segments():
    whole = segments(PrefillRow(0, 0, 128, 64, 0.5), 32, 0)
    parts = segments(PrefillRow(0, 0, 64, 64, 0.5), 32, 0)
    parts += segments(PrefillRow(0, 64, 64, 128, 0.5), 32, 0)
    assert parts == whole


def test_short_history_is_dense_from_token_zero():
    items = segments(PrefillRow(0, 0, 64, 32, 0.5), 32, 64)
    assert items == [(0, 0, 32, 32, 0, 0), (0, 32, 32, 64, 64, 32)]


def test_first_segment_has_no_list_even_without_min_context():
    assert segments(PrefillRow(0, 0, 16, 0, 0.5), 32, 0) == [(0, 0, 16, 0, 0, 0)]


def test_list_never_exceeds_the_budget():
    for budget in (0.01, 0.3, 0.999):
        for item in segments(PrefillRow(0, 0, 1000, 37, budget), 32, 0):
            assert item[plan.LIST_LENGTH] <= budget * item[plan.HISTORY]


def test_each_request_has_its_lists_longest_history_first():
    rows = [PrefillRow(4, 0, 40 * 32, 0, 0.5), PrefillRow(1, 1280, 32, 320, 0.5)]
    one, other = build_work_lists(rows, 32, 0, CPU, 1000)
    histories = [item[plan.HISTORY] for item in one.items.tolist()]
    assert histories == list(range(39 * 32, -1, -32))
    assert one.groups.tolist() == [[0, 16], [16, 16], [32, 8]]
    assert (one.max_history, one.max_list, one.max_queries) == (39 * 32, 39 * 16, 32)
    assert (one.row, one.chunk_start, one.fits.tolist()) == (4, 0, [[0, 1280, 39 * 32]])
    assert (other.row, other.chunk_start, other.fits.tolist()) == (1, 1280, [[1280, 32, 320]])


def test_lists_hold_every_item_once_and_the_first_sees_the_most():
    lists = build_work_lists([PrefillRow(0, 5, 10 * 32, 64, 0.5)], 32, 0, CPU, 4)
    assert [one.num_items for one in lists] == [4, 4, 2], "cut at multiples in the sequence"
    assert [one.first_of_chunk for one in lists] == [True, False, False]
    for one in lists:
        assert one.chunk_start == 5
        assert one.fits.tolist() == [[5, 64, 96], [69, 128, 224], [197, 128, 352]]
        first, queries, history = one.fits[one.fit].tolist()
        assert queries == sum(item[plan.NUM_QUERIES] for item in one.items.tolist())
        assert first == min(item[plan.QUERY_START] for item in one.items.tolist())
        assert history == one.max_history
        assert (one.max_fit_queries, one.max_fit_history) == (128, 352)
    starts = sorted(item[plan.QUERY_START] for one in lists for item in one.items.tolist())
    assert starts == list(range(5, 325, 32))


def test_a_chunk_has_no_more_lists_than_are_prepared_for_together():
    lists = build_work_lists([PrefillRow(0, 0, 10 * 32, 0, 0.5)], 32, 0, CPU, 1)
    chunks = [one.chunk_start for one in lists if one.first_of_chunk]
    assert chunks == [0, 32 * plan.FITS, 64 * plan.FITS]
    assert all(one.fits.shape[0] <= plan.FITS for one in lists)
    assert [one.chunk_start for one in lists] == sorted(one.chunk_start for one in lists)


@pytest.mark.parametrize(("segment", "wave"), [(0, 1), (-1, 1), (32, 0)])
def test_refuses_sizes_that_are_not_positive(segment, wave):
    with pytest.raises(ValueError, match="must be positive"):
        build_work_lists([PrefillRow(0, 0, 1, 0, 0.5)], segment, 0, CPU, wave)
