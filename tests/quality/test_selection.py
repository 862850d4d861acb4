import pytest
import torch

from s2o_vllm.benchmarks.quality.selection import (
    Ranking,
    Selector,
    counts_gap,
    counts_half,
    counts_heads,
    counts_level,
    counts_mass,
    counts_top,
)
from s2o_vllm.benchmarks.quality.units import Rows, Unit

# Two units: one peaked, one flat, best first.
LOGS = torch.tensor([[9.0, 2.0, 1.0, 0.0], [4.0, 3.9, 3.8, 3.7]])


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (counts_top, [2, 2]),
        (counts_gap, [1, 3]),  # gaps 0 | 0, 0.1, 0.2
        (counts_level, [1, 3]),  # 9 | 4, 3.9, 3.8
        (counts_half, [1, 3]),  # one each, then 3.9 and 3.8 of the flat unit
    ],
)
def test_rules_share_the_budget(rule, wanted):
    assert rule(LOGS, 2).tolist() == wanted
    assert rule(LOGS, 4).tolist() == [4, 4]


def test_heads_of_a_tile_share_its_budget():
    """Two heads of two tiles: each tile spends what its heads have together."""
    flat = torch.linspace(0, -1, 40)
    peaked = torch.cat([torch.full((2,), 3.0), torch.linspace(-20, -30, 38)])
    ordered = torch.stack([flat, flat, peaked, flat])  # head by head
    assert counts_heads(ordered, 8, 2).tolist() == [12, 8, 4, 8]


def test_mass_rule_takes_the_fewest_that_hold_a_share():
    # Mass before each: 0, .9, .95, .98 | 0, .4, .7, .9: the four smallest are 0, 0, .4, .7.
    mass = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.4, 0.3, 0.2, 0.1]])
    assert counts_mass(mass, 2).tolist() == [1, 3]


def test_blocks_become_positions_of_the_layout(make_segment):
    segment = make_segment(heads=1, kv_heads=1, history=10, length=32)
    rows = Unit.parse("32xhead").rows(segment)
    layout = torch.arange(9, -1, -1)[None]
    ranking = Ranking(rows, torch.tensor([[0.0, 1.0, 2.0]]), block=4, layout=layout)
    selection = Selector(segment, ranking, "top").select(2 / 3)
    assert selection.tokens[0].tolist() == [1, 0, 5, 4, 3, 2]  # the last block has two tokens


def test_tiers_cover_what_is_skipped(make_segment):
    segment = make_segment(heads=1, kv_heads=1, history=40, length=32)
    scores = torch.arange(40.0, 0, -1)[None]
    ranking = Ranking(Unit.parse("32xhead").rows(segment), scores)
    selection = Selector(segment, ranking, "top", "tiers").select(0.1)
    summaries = selection.summaries[0]
    assert selection.tokens[0].tolist() == [0, 1, 2, 3]
    assert summaries.count.tolist() == [4, 8, 16, 8]
    torch.testing.assert_close(summaries.k[0], segment.k[0, 4:8].mean(0))
    torch.testing.assert_close(summaries.v[3], segment.v[0, 32:].mean(0))


def test_unknown_rules_and_corrections_are_refused(make_segment):
    ranking = Ranking(Rows(torch.zeros(1, 1).long(), torch.zeros(1).long()), torch.ones(1, 4))
    with pytest.raises(ValueError, match="rule must be one of"):
        Selector(make_segment(), ranking, "best")
    with pytest.raises(ValueError, match="correction must be one of"):
        Selector(make_segment(), ranking, "top", "magic")


@pytest.mark.parametrize("text", ["32xhead", "16xkv", "64xhead-sorted", "32xkv-sorted"])
def test_units_hold_every_row_once(make_segment, text):
    segment = make_segment()
    unit = Unit.parse(text)
    rows, kv = unit.rows(segment)
    assert str(unit) == text
    assert rows.flatten().sort().values.tolist() == list(range(4 * 64))
    heads = rows // 64
    assert (heads // 2 == kv[:, None]).all()
    assert len(heads[0].unique()) == (2 if unit.shared else 1)


def test_a_shared_unit_packs_the_heads_of_a_query_side_by_side(make_segment):
    rows, _ = Unit.parse("32xkv").rows(make_segment())
    assert rows[0, :4].tolist() == [0, 64, 1, 65]
    assert rows[1, :2].tolist() == [32, 96]


def test_sorted_units_separate_two_kinds_of_queries(make_segment):
    q = torch.zeros(4, 64, 16)
    q[:, ::2, 0], q[:, 1::2, 0] = 5.0, -5.0
    segment = make_segment(q=q)
    rows, _ = Unit.parse("32xhead-sorted").rows(segment)
    assert all(len((tile % 2).unique()) == 1 for tile in rows)


@pytest.mark.parametrize("text", ["128", "0xhead", "128xheads", "xkv", "128xkv-random"])
def test_bad_units_are_refused(text):
    with pytest.raises(ValueError, match="unit must look like"):
        Unit.parse(text)
