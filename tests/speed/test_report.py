"""The speed report and the tables of results, from result files that the eye can check."""

import json
from pathlib import Path

import pytest

from s2o_vllm.benchmarks.quality.methods import parse, settings
from s2o_vllm.benchmarks.quality.tables import read_result
from s2o_vllm.benchmarks.speed import report as speed_report
from s2o_vllm.benchmarks.speed.headline import headline
from s2o_vllm.benchmarks.speed.report import BEGIN, END, NAMES, main, renewed, report
from s2o_vllm.config import S2OConfig

ROOT = Path(__file__).parents[2]
HEAD = {
    "device": "a card", "torch": "2", "triton": "3", "vllm": "0.32", "commit": "c0ffee00",
    "date": "d",
}  # fmt: skip


def result(*rows, **more):
    return HEAD | more | {"rows": list(rows)}


def attention_row(budget, total, **changes):
    return {
        "shape": "llama-3.1-8b", "context": 1000, "kv_dtype": "bf16", "ranking": "low_rank",
        "budget": budget, "rank_ms": 1.0, "attend_ms": total - 1.0, "total_ms": total,
        "fa3_paged_ms": 24.0, "fa2_ms": 48.0, "dense_mode_ms": 32.0, "early_stop_overhead": 0.0123,
    } | changes  # fmt: skip


def real_row(budget, total, **changes):
    real = {
        "inputs": "real-heads", "model": "qwen", "text": "essays", "ranking": S2OConfig().ranking,
        "relative_mse": 0.015, "relative_mse_worst_layer": 0.2, "row_error_p99": 0.345,
        "dropped_mass": 0.147,
    }  # fmt: skip
    return attention_row(budget, total, **real | changes)


def quality_row(spec, budget, error, **changes):
    method = parse(spec)
    return {
        "model": "qwen2.5-coder-1.5b", "text": "essays", "context": 1000, "method": method.name,
        "unit": method.unit, "settings": settings(method), "budget": budget,
        "density": budget, "relative_mse": error, "commit": "beef00000",
    } | changes  # fmt: skip


def sparse_decode(own, stock, ratio, density):
    return {
        "context": 9, "batch": 4, "layers": 8, "decode_budget": 0.05, "what": "tpot_ms",
        "s2o": own, "stock": stock, "ratio": ratio, "ratio_low": ratio - 0.1,
        "ratio_high": ratio + 0.1, "density": density,
    }  # fmt: skip


def nothing():
    return dict.fromkeys(NAMES)


def test_the_headline_is_the_fastest_setting_whose_error_is_small():
    results = nothing() | {
        "attention": result(
            attention_row(0.02, 2.0), attention_row(0.05, 3.0), attention_row(0.1, 6.0),
            attention_row(0.05, 1.0, kv_dtype="fp8"), attention_row(0.05, 1.0, shape="other"),
            attention_row(0.3, 0.5),
        ),
        "quality": result(
            quality_row("served", 0.02, 0.03), quality_row("served", 0.05, 0.01),
            quality_row("served", 0.05, 0.02), quality_row("served", 0.1, 0.001),
            quality_row("served", 0.1, 9.0, text="other"), quality_row("served", 0.1, 9.0, tau=0.1),
            quality_row("pbs", 0.05, 0.09),
        ),
    }  # fmt: skip
    first, second = headline(results).splitlines()[2:]
    assert (
        "attention of 1,000 tokens, ranking low_rank, at an error of 0.0150 (budget 0.05)" in first
    )
    assert "3.0 ms: **8.0x** faster than paged FlashAttention 3, **16.0x** than 2" in first
    assert "`attention.json`](benchmarks/SPEED.md) at c0ffee0 |" in first
    assert (
        "error of low_rank at 5 % of 1,000 tokens | 0.0150, **6.0x** less than PBS-Attn's 0.0900"
        in second
    )
    assert second.endswith("at beef000 |")


def test_a_first_token_stands_beside_the_tasks_of_its_commit_and_budget():
    def first(backend, budget, seconds):
        return {"context": 9, "backend": backend, "budget": budget, "ttft_s": seconds}

    def mean(budget, difference):
        ends = {"difference_low": -3.0, "difference_high": 1.0}
        row = {"task": "mean", "context": 4096, "budget": budget, "difference": difference}
        return row | ends | {"tasks": 4, "paired": 96}

    times = result(first("stock", 1.0, 10.0), first("s2o", 0.1, 4.0), first("s2o", 0.05, 2.5))
    tasks = result(mean(1.0, None), mean(0.05, -1.04), mean(0.3, 0.0))
    results = nothing() | {"ttft": times, "ruler_h200": tasks}
    (only,) = headline(results).splitlines()[2:]
    assert "first token of 9 tokens from `vllm serve`, budget 0.05; RULER at 4,096, 4 tasks" in only
    assert "2.50 s for stock's 10.00: **4.00x**; -1.0 points from dense [-3.0, +1.0]" in only
    tasks["rows"].append(mean(0.05, -2.0) | {"question": "start"})
    end, start = headline(results).splitlines()[2:]
    assert "96 prompts |" in end
    assert "96 prompts, question first |" in start
    tasks["rows"].pop()
    results["ruler_h200"] = tasks | {"commit": "another"}
    lines = headline(results).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "-1.0 points [-3.0, +1.0]", "+0.0 points [-3.0, +1.0]"
    ], "no speed without the tasks of its commit"  # fmt: skip


def test_needles_are_told_beside_the_best_of_others():
    def row(method, held, budget=0.025, needles=4):
        place = {"text": "code", "context": 4096, "budget": budget, "unit": "", "method": method}
        return place | {"needles": needles, "probability": 2.0, "held": held}

    rows = [row("served", 1.0), row("served", 2.0), row("pbs", 0.2), row("s2o_paper", 0.5),
            row("token_oracle", 2.0), row("served", 2.0, 0.05), row("pbs", 2.0, 0.05)]  # fmt: skip
    (only,) = headline(nothing() | {"quality_needles": result(*rows)}).splitlines()[2:]
    assert "held by lists of 2.5 % of 4,096 tokens of code" in only
    assert "**75.0 %**; the best of other methods, s2o_paper, 25.0 %; PBS-Attn 10.0 %" in only


def test_far_tokens_are_told_by_setting():
    row = {"what": "far_tokens_code", "context": 4096, "budget": 0.05, "setting": "", "samples": 9,
           "distance": "all", "value": 0.04, "low": -0.01, "high": 0.09}  # fmt: skip
    rows = [row, row | {"setting": "other"}, row | {"distance": 2048}, row | {"value": None}]
    one, other = headline(nothing() | {"fidelity": result(*rows)}).splitlines()[2:]
    assert "9 tokens of code that need far context, 4,096 tokens, budget 0.05 |" in one
    assert "| +0.040 nats lost [-0.010, +0.090] |" in one
    assert "budget 0.05 (other) |" in other


def test_the_headline_is_of_real_heads_where_there_are_some():
    """The served budget, whatever its error; without it every budget, the fastest first."""
    served = S2OConfig().sparsity_budget
    random = attention_row(0.05, 1.0, inputs="random")
    results = nothing() | {"quality": result(quality_row("served", 0.05, 0.01))}
    rows = [
        real_row(served, 4.0, relative_mse=0.05), real_row(0.3, 2.0),
        real_row(0.2, 1.0, ranking="another"),
        real_row(0.3, 3.0, context=500), real_row(0.2, 2.0, context=500),
        real_row(0.01, 1.0, context=500, relative_mse=0.03),
        real_row(served, 9.0, context=200, min_budget_tokens=50),
    ]  # fmt: skip
    lines = headline(results | {"attention": result(random, *rows)}).splitlines()[2:]
    first, second, third, fourth, fifth = lines
    assert f"attention of 1,000 tokens, heads of qwen on essays (budget {served:g})" in first
    assert "4.0 ms: **6.0x** faster than paged FlashAttention 3, **12.0x** than 2" in first
    errors = "worst layer 0.2000, worst hundredth of rows 0.34, dropped mass 0.147"
    assert f"; error of the same tensors 0.0500, {errors} |" in first
    for line, budget in ((second, "0.01"), (third, "0.2"), (fourth, "0.3")):
        assert f"attention of 500 tokens, heads of qwen on essays (budget {budget})" in line
    assert f"(budget {served:g}, at least 50 tokens), ranking included" in fifth
    only = headline(results | {"attention": result(random, rows[2])})
    assert (
        "attention of 1,000 tokens, ranking low_rank, at an error of 0.0100 (budget 0.05)" in only
    )


def test_real_heads_have_a_table_of_their_own():
    rows = [attention_row(0.05, 3.0, ranking="unknown"), real_row(0.05, 4.0, ranking="other")]
    text = report(nothing() | {"attention": result(*rows)})
    real, random = (text.index(f"\n\nllama-3.1-8b{more}") for more in (", real heads", ":"))
    assert real < random
    assert "llama-3.1-8b, real heads of qwen on essays, errors of the same tensors:" in text
    errors = "0.0150 | 0.2000 | 0.345 | 0.147"
    assert f"| 1,000, `other`, 5 % | {errors} | 1.00 | 3.00 | 4.00 | 6.0x | 12.0x |" in text
    assert "| 1,000, `unknown`, bf16, 5 % | - | 1.00 | 2.00 | 3.00 | 8.0x | 16.0x |" in text


def test_servers_of_random_weights_are_compared_with_random_heads():
    model = {"model": "Llama-3.1-8B shape", "context": 1000}
    first = result(
        model | {"backend": "stock", "budget": 1.0, "ttft_s": 10.0},
        model | {"backend": "s2o", "budget": 0.1, "ttft_s": 5.0},
    )
    real, random = real_row(0.1, 3.0, fa3_paged_ms=100.0), attention_row(0.1, 3.0, fa3_paged_ms=200)
    for rows, seconds in (((real, random), "6.400"), ((real,), "3.200")):
        text = report(nothing() | {"ttft": first, "attention": result(*rows)})
        assert f"| 1,000, budget 0.1 | {seconds} |" in text


def test_served_and_accuracy_lines():
    mean = {"task": "mean", "context": 99, "budget": 0.1, "difference": -1.23,
            "difference_low": -3.0, "difference_high": 0.5}  # fmt: skip
    results = nothing() | {
        "decode": result({"stock": 2.0, "s2o": 1.9}, {"stock": 2.0, "s2o": 2.1}),
        "decode_sparse": result(
            sparse_decode(1.0, 2.0, 2.0, density=0.05), sparse_decode(2.0, 1.0, 0.5, density=None)
        ),
        "ruler": result(mean | {"difference": None}, mean, mean | {"task": "vt"}),
        "perplexity": result({"context": 7, "budget": 0.1, "perplexity": 12.3, "difference": 0.01}),
    }  # fmt: skip
    lines = headline(results).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "-1.2 points [-3.0, +0.5]",
        "12.30, +0.0100 nats from dense",
        "0.950 to 1.050 of its time",
        "1.00 ms for stock's 2.00: **2.00x** [1.90, 2.10]",
    ]


def test_a_time_names_its_card():
    """Accuracy is the same on all."""
    results = nothing() | {
        "decode": result({"stock": 2.0, "s2o": 2.0}, device="1x NVIDIA H200"),
        "perplexity": result(
            {"context": 7, "budget": 0.1, "perplexity": 12.3, "difference": 0.01},
            device="1x NVIDIA H200",
        ),
    }  # fmt: skip
    accuracy, time = headline(results).splitlines()[2:]
    assert accuracy.endswith("at c0ffee0 |")
    assert time.endswith("at c0ffee0, H200 |")


def test_first_tokens_beside_attention_that_costs_nothing():
    """By hand: of 10 s attention takes 32 x 2 x 100 ms = 6.4 (FlashAttention 2: 12.8)."""
    model = {"model": "Llama-3.1-8B shape"}
    first = result(
        model | {"context": 2000, "backend": "stock", "budget": 1.0, "ttft_s": 10.0},
        model | {"context": 2000, "backend": "s2o", "budget": 0.1, "ttft_s": 5.0},
    )
    attention = result(
        attention_row(0.1, 3.0, context=2000, fa3_paged_ms=200.0, fa2_ms=400.0),
        attention_row(0.1, 3.0, context=4000, fa3_paged_ms=1.0, fa2_ms=1.0),
    )
    line = "| 2,000, budget 0.1 | 6.400 | 2.78x | 2.00x | 72.0 % | 16.400 | 3.28x |"
    assert line in report(nothing() | {"ttft": first, "attention": attention})
    for other in (nothing(), {"attention": None}):
        assert line not in report(nothing() | {"ttft": first} | other)
    other = result(*(row | {"model": "another"} for row in first["rows"]))
    assert line not in report(nothing() | {"ttft": other, "attention": attention})


def test_a_section_says_where_it_is_from_or_how_to_measure_it():
    text = report(nothing() | {"attention": result(attention_row(0.05, 3.0))})
    row = (
        "| 1,000, `low_rank`, bf16, 5 % | - | 1.00 | 2.00 | 3.00 | 8.0x | 16.0x | 12.0x | 75.0 % |"
    )
    assert f"{row} 1.2 % |" in text
    assert "`s2o bench attention`. `attention.json`: a card; vllm 0.32, torch 2, triton 3;" in text
    assert "Not measured: `s2o bench ttft` makes `ttft.json`." in text


def test_only_what_lies_between_the_marks_is_renewed():
    assert renewed("no marks", "x") == "no marks"
    once = renewed(f"a\n{BEGIN}\nold\n{END}\nb\n", "new")
    assert once == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    assert renewed(once, "new") == once


def test_the_command(tmp_path, capsys):
    (tmp_path / "ttft.json").write_text(json.dumps(result()))
    options = ["--results", str(tmp_path), "--out", str(tmp_path / "S.md")]
    options += ["--readme", str(tmp_path / "none.md"), "--page", str(tmp_path / "none.md")]
    assert main(options) == 0
    assert "not measured: attention.json" in capsys.readouterr().out
    assert (tmp_path / "S.md").read_text().startswith("# Speed")
    (tmp_path / "ttft.json").write_text("[]")
    assert main(options) == 2
    assert "ttft.json is not a result file" in capsys.readouterr().err


TABLES = {
    "README.md": {"short": True},
    "docs/benchmarks.md": {"root": "../"},
}


@pytest.mark.parametrize("name", [*TABLES, "benchmarks/SPEED.md"])
def test_what_is_written_is_what_the_files_say(name):
    """`s2o bench report` was run after the last result: no number is typed in by hand."""
    results = {name: read_result(ROOT / f"benchmarks/results/{name}.json") for name in NAMES}
    text = (ROOT / name).read_text(encoding="utf-8")
    if name in TABLES:
        assert speed_report.BEGIN in text
        assert text == renewed(text, headline(results, **TABLES[name]))
    else:
        assert text == report(results)


def test_readme_has_few_lines_of_a_file_and_one_of_each_text():
    row = {"what": "far_tokens_code", "context": 4096, "setting": "", "samples": 9,
           "distance": "all", "value": 0.04, "low": -0.01, "high": 0.09}  # fmt: skip
    rows = [row | {"budget": budget} for budget in (0.1, 0.05)]
    rows += [row | {"budget": 0.1, "what": "far_tokens_text"}]
    error = {"context": 7, "budget": 0.1, "perplexity": 12.3, "difference": 0.01}
    results = nothing() | {"fidelity": result(*rows), "perplexity": result(error)}
    code, text = headline(results, short=True).splitlines()[2:]
    assert "tokens of code" in code
    assert "budget 0.1 |" in code
    assert "tokens of text" in text
    assert len(headline(results).splitlines()[2:]) == 4
    assert "(../benchmarks/QUALITY.md)" in headline(results, root="../").splitlines()[2]
