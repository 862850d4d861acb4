import argparse
import json
import sys

import pytest

from s2o_vllm.benchmarks.speed import attention, attention_plot

DENSE = {"fa3_paged_ms": 9.0, "fa2_ms": 20.0}


def row(context=8192, ranking="low_rank", budget=0.1, **more):
    return {
        "shape": "llama-3.1-8b", "context": context, "kv_dtype": "bf16", "ranking": ranking,
        "budget": budget, "rank_ms": 1.0, "attend_ms": 2.0, "total_ms": 3.0, **DENSE,
    } | more  # fmt: skip


def result(*rows):
    head = {"device": "1x Some Card", "vllm": "0.32.0", "commit": "abc1234", "date": "2026-01-02"}
    return {**head, "rows": list(rows)}


def arguments(*kv_dtypes):
    budgets = [0.05, 0.1]
    return argparse.Namespace(budgets=budgets, kv_dtypes=list(kv_dtypes) or None)


@pytest.mark.parametrize(
    ("capability", "context", "budgets"),
    [((9, 0), 131072, [0.05]), ((9, 0), 8192, []), ((8, 0), 131072, [])],
)
def test_by_default_little_is_measured_of_an_fp8_cache(monkeypatch, capability, context, budgets):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert attention.budgets_of(arguments(), "bf16", context) == [0.05, 0.1]
    assert attention.budgets_of(arguments(), "fp8", context) == budgets


def test_all_is_measured_of_a_cache_that_is_asked_for():
    assert attention.budgets_of(arguments("fp8"), "fp8", 8192) == [0.05, 0.1]
    assert attention.budgets_of(arguments("fp8"), "bf16", 8192) == []


def test_the_printed_line_tells_the_share():
    line = attention.summary(row(attend_tflops=212.3, attend_of_ceiling=0.456))
    assert "attend    2.00 (212 TFLOP/s, 46% of the ceiling) total    3.00 ms" in line
    assert line.endswith("FA3 paged    9.00 (3.0x), FA2   20.00 (6.7x)")


def test_the_printed_line_of_an_fp8_cache_tells_what_it_costs():
    errors = {"quantised_error": 0.0312, "fa3_quantised_error": 0.045}
    line = attention.summary(row(attend_tflops=1, attend_of_ceiling=1, kv_dtype="fp8", **errors))
    assert line.endswith("; fp8 costs an error of 3.1% (FA3 4.5%)")


REAL = {
    "inputs": "real-heads", "model": "m", "text": "t", "relative_mse": 0.01234,
    "relative_mse_worst_layer": 0.05, "row_error_p99": 0.306, "dropped_mass": 0.1469,
}  # fmt: skip


def test_the_printed_line_of_real_heads_tells_the_errors():
    line = attention.summary(row(attend_tflops=1, attend_of_ceiling=1, **REAL))
    errors = "relative MSE 0.0123, worst layer 0.0500, worst hundredth of rows from 0.31 on"
    assert line.endswith(f"; real heads: {errors}, dropped mass 0.147")
    unknown = attention.summary(
        row(attend_tflops=1, attend_of_ceiling=1, **REAL | {"dropped_mass": None})
    )
    assert unknown.endswith(f"; real heads: {errors}")


def test_lines_of_an_old_file():
    rows = [row(context, budget=budget) for context in (32768, 8192) for budget in (0.1, 0.05)]
    rows.append(row(8192, "mean_query", total_ms=2.5, rank_ms=None))
    lines = attention_plot.lines(rows)
    assert [line.label for line in lines] == [
        "FA3, paged (vLLM's own)", "FA2", "low_rank, ranking alone", "low_rank, budget 0.05",
        "low_rank, budget 0.1", "mean_query, budget 0.1",
    ]  # fmt: skip
    assert [line.points for line in lines[2:4]] == [
        [(8192, 1.0), (32768, 1.0)],
        [(8192, 3.0), (32768, 3.0)],
    ]
    assert lines[-1].points == [(8192, 2.5)]


def test_an_fp8_cache_has_lines_of_its_own():
    old = {key: value for key, value in row().items() if key != "kv_dtype"}
    drawn = {line.label: line.points for line in attention_plot.lines(
        [old, row(kv_dtype="fp8", total_ms=2.0, fa3_paged_ms=5.0)]
    )}  # fmt: skip
    assert drawn["low_rank, budget 0.1"] == [(8192, 3.0)]
    assert drawn["low_rank, budget 0.1, fp8 KV"] == [(8192, 2.0)]
    assert drawn["FA3, paged (vLLM's own)"] == [(8192, 9.0)]
    assert drawn["FA3, paged, fp8 KV"] == [(8192, 5.0)]


def test_the_picture_has_a_panel_a_shape_and_says_where_from():
    pytest.importorskip("matplotlib")
    more = {"fa3_ms": 8.0, "cudnn_ms": 7.0, "attend_of_ceiling": 0.5}
    drawn = attention_plot.figure(result(row(**more), row(shape="qwen2.5-1.5b")))
    first, second = (
        {line.get_label(): list(line.get_ydata()) for line in axis.lines} for axis in drawn.axes
    )
    assert [axis.get_title() for axis in drawn.axes] == ["llama-3.1-8b", "qwen2.5-1.5b"]
    assert {axis.get_xscale() + axis.get_yscale() for axis in drawn.axes} == {"loglog"}
    both = {
        "FA3, paged (vLLM's own)": [9], "FA2": [20],
        "low_rank, ranking alone": [1], "low_rank, budget 0.1": [3],
    }  # fmt: skip
    assert first == {**both, "FA3, contiguous": [8], "cuDNN": [7]}
    assert second == both
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == set(first)
    assert drawn.get_suptitle() == "1x Some Card; vLLM 0.32.0; commit abc1234; 2026-01-02"


def test_real_heads_have_a_panel_of_their_own():
    pytest.importorskip("matplotlib")
    rows = [row(inputs="random"), row(total_ms=4.0, fa3_paged_ms=8.0, **REAL), row(32768)]
    drawn = attention_plot.figure(result(*rows))
    assert [axis.get_title() for axis in drawn.axes] == [
        "llama-3.1-8b", "llama-3.1-8b, real heads"
    ]  # fmt: skip
    random, real = (
        {line.get_label(): list(line.get_ydata()) for line in axis.lines} for axis in drawn.axes
    )
    assert random["low_rank, budget 0.1"] == [3, 3]
    assert real["low_rank, budget 0.1"] == [4]
    assert real["FA3, paged (vLLM's own)"] == [8]


def plot_only(tmp_path, content=None):
    results, picture = tmp_path / "attention.json", tmp_path / "plots" / "attention.png"
    if content is not None:
        results.write_text(content if isinstance(content, str) else json.dumps(content))
    code = attention.main(["--plot-only", "--out", str(results), "--plot", str(picture)])
    return code, picture


def test_redraws_without_a_card(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, picture = plot_only(tmp_path, result(row(), row(32768)))
    assert (code, capsys.readouterr().out) == (0, f"picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no result file {} to draw."),
        ("no json", "{} is not a result file."),
        (result(), "{} has no rows to draw."),
    ],
)
def test_nothing_to_redraw_is_one_sentence(tmp_path, capsys, content, told):
    code, picture = plot_only(tmp_path, content)
    assert code == 2
    told = told.format(tmp_path / "attention.json")
    assert capsys.readouterr().err == f"s2o bench attention: {told}\n"
    assert not picture.exists()


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, picture = plot_only(tmp_path, result(row()))
    assert code == 2
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not picture.exists()
