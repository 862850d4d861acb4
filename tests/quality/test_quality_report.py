"""The report, from result files small enough to be checked by eye."""

import importlib.util
import json

import pytest

from s2o_vllm.benchmarks.quality import report
from s2o_vllm.benchmarks.quality.fidelity_plot import fidelity_by_speed
from s2o_vllm.benchmarks.quality.methods import parse, settings
from s2o_vllm.benchmarks.quality.plots import dense_times, error_by_density, error_by_time, partial
from s2o_vllm.config import S2OConfig

PNG = b"\x89PNG\r\n"
HEAD = {
    "device": "a card", "torch": "2", "triton": "3", "vllm": "0.32", "commit": "c0ffee", "date": "d"
}  # fmt: skip


def quality_row(spec, budget, error, layer=0, **changes):
    method = parse(spec)
    return {
        "model": "qwen2.5-coder-1.5b", "text": "essays", "context": 16384, "layer": layer,
        "method": method.name, "unit": method.unit, "settings": settings(method),
        "budget": budget, "density": budget, "relative_mse": error, "attention_ms": None,
    } | changes  # fmt: skip


QUALITY = [
    quality_row("served", 0.05, 0.03, layer=0),
    quality_row("served", 0.05, 0.05, layer=1),
    quality_row("served", 0.1, 0.015),
    quality_row("served:unit=32xkv", 0.05, 0.7777),
    quality_row("served", 0.05, 0.8888, tau=0.01),
    quality_row("pbs", 0.05, 0.0834),
    quality_row("mean_query:unit=512xkv,rule=heads,correction=regions", 1.0, 3e-14),
]
LAYERS = [
    quality_row("served", 0.05, 0.02, layer=3, position=0.5),
    quality_row("served", 0.05, 0.04, layer=3, position=1.0),
    quality_row("served", 0.05, 0.054, layer=11, position=0.5),
    quality_row("served", 0.05, 0.078, layer=11, position=1.0),
    quality_row("pbs", 0.05, 0.0912, layer=3, position=1.0),
]
ATTENTION = [
    {"shape": "qwen2.5-1.5b", "context": 16384, "ranking": "low_rank", "budget": 0.05,
     "total_ms": 3.5, "fa3_paged_ms": 9.5},
    {"shape": "qwen2.5-1.5b", "context": 16384, "ranking": "low_rank", "budget": 0.05,
     "kv_dtype": "fp8", "total_ms": 0.5, "fa3_paged_ms": 0.5},
    {"shape": "llama-3.1-8b", "context": 16384, "ranking": "low_rank", "budget": 0.1,
     "total_ms": 7.0, "fa3_paged_ms": 20.0},
    {"shape": "m", "context": 16384, "ranking": S2OConfig().ranking, "budget": 0.1,
     "total_ms": 5.0, "fa3_paged_ms": 20.0},
]  # fmt: skip
RULER = [
    {"model": "m", "context": 16384, "task": task, "backend": "s2o", "budget": budget,
     "score": score, "low": score - 10, "high": score + 5, "samples": 20, "failed": 1,
     "difference": None if budget == 1 else -2.5,
     "difference_low": None if budget == 1 else -4.0,
     "difference_high": None if budget == 1 else 1.0,
     "paired": 0 if budget == 1 else 20, "density": None if budget == 1 else 0.123, "tasks": 1}
    for budget, score in ((1.0, 81.5), (0.1, 79.0))
    for task in ("vt", "mean")
]  # fmt: skip
FIDELITY = [
    {"model": "m", "context": 32768, "what": "far_tokens_code", "source": "python-3.11.7",
     "judged": 2048, "near": 2048, "backend": "s2o", "setting": "", "budget": 0.05,
     "distance": distance, "value": value, "low": value - 0.01, "high": value + 0.02,
     "samples": samples, "windows": 8, "failed": 0, "density": 0.061}
    for distance, value, samples in (("all", 0.0421, 77), (8192, 0.0123, 50), (32768, 0.09, 27))
] + [
    {"model": "m", "context": 32768, "what": "agreement", "source": "", "judged": 64, "near": 0,
     "backend": "s2o", "setting": setting, "budget": budget, "value": value, "low": 0.7,
     "high": 0.95, "samples": 32, "prefix": 55.5, "prefix_low": 50.0, "prefix_high": 61.0,
     "failed": 1, "density": None}
    for setting, budget, value in (("", 1.0, 0.97), ("", 0.05, 0.84), ("mean_query", 0.05, 0.81))
]  # fmt: skip
NEEDLES = [
    {"model": "m", "text": "code", "context": 4096, "layer": layer, "position": 1.0,
     "method": method, "unit": unit, "budget": budget, "needles": 3, "probability": 1.5,
     "held": held}
    for layer in (0, 1)
    for method, unit, budget, held in (
        ("served", "64xkv", 0.1, 1.2), ("served", "64xkv", 0.2, 1.5), ("pbs", "128xhead", 0.1, 0.3)
    )
]  # fmt: skip
PERPLEXITY = [
    {"model": "m", "text": "essays", "context": 4096, "tail": 512, "backend": "s2o", "budget": 0.1,
     "nll": 2.5, "perplexity": 12.182, "difference": 0.0123, "difference_low": None,
     "difference_high": None, "tail_nll": 2.6, "tail_perplexity": 13.464, "tail_difference": 0.02,
     "tail_difference_low": -0.01, "tail_difference_high": 0.05, "samples": 4, "failed": 0,
     "paired": 4, "density": 0.111},
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write result files, run the command, return its exit code and the report."""

    def write(**files):
        results = tmp_path / "results"
        results.mkdir(exist_ok=True)
        for name, rows in files.items():
            text = rows if isinstance(rows, str) else json.dumps(HEAD | {"rows": rows})
            (results / f"{name}.json").write_text(text)
        out = tmp_path / "QUALITY.md"
        code = report.main(["--results", str(results), "--out", str(out)])
        return code, out.read_text() if out.exists() else None

    return write


def test_every_number_comes_from_a_file(write, tmp_path):
    code, text = write(
        quality=QUALITY, quality_layers=LAYERS, attention=ATTENTION, ruler=RULER,
        fidelity=FIDELITY, perplexity=PERPLEXITY, quality_needles=NEEDLES,
    )  # fmt: skip
    assert code == 0
    assert "m, 4,096 tokens, 6 needles:" in text
    assert "|  | code, 10 % | code, 20 % |" in text
    assert "| served, 64xkv | 80.0 | 100.0 |" in text
    assert "| pbs, 128xhead | 20.0 | - |" in text
    assert "not measured" not in text.lower()
    assert "| `served` | 0.0400 | 0.0150 | - |" in text  # the mean of two layers
    assert "| `pbs` | 0.0834 | - | - |" in text
    assert "0.7777" not in text  # another setting
    assert "0.8888" not in text  # early stop
    assert "| vt | 81.5 [71.5, 86.5] | 79.0 [69.0, 84.0] | -2.5 [-4.0, +1.0] |" in text
    assert "m, 16,384 tokens. dense: 20 answers over 1 tasks, 1 refused; s2o, budget 0.1:" in text
    assert "density 0.123" in text
    assert "| 12.182 | +0.0123 | 13.464 | +0.0200 [-0.0100, +0.0500] | 4 | 0 | 0.111 |" in text
    assert "far_tokens_code, m, 32,768 tokens:" in text
    assert (
        "|  | all far tokens | within 8,192 | within 32,768 | windows | refused | density |" in text
    )
    assert (
        "| s2o, budget 0.05 | +0.042 [+0.032, +0.062] (77) | +0.012 [+0.002, +0.032] (50) "
        "| +0.090 [+0.080, +0.110] (27) | 8 of python-3.11.7 | 0 | 0.061 |"
    ) in text
    assert "| dense | 0.97 [0.70, 0.95] | 55.5 [50.0, 61.0] | 32 | 1 | - |" in text
    assert "| mean_query, s2o, budget 0.05 | 0.81 [0.70, 0.95] |" in text
    assert "![Fidelity against speed](plots/fidelity_by_speed.png)" in text
    assert (tmp_path / "plots" / "fidelity_by_speed.png").read_bytes().startswith(PNG)
    assert text.count("a card; vllm 0.32, torch 2, triton 3; commit c0ffee; d.") == 7
    assert "| `served` | 0.0480 |" in text  # of all layers, and each of them
    assert "| layer | `served`, 5 % | `pbs`, 5 % |" in text
    assert "| 3 | 0.0300 | 0.0912 |" in text
    assert "| 11 | 0.0660 | - |" in text
    for name in ("density", "time"):
        assert f"](plots/error_by_{name}.png)" in text
        assert (tmp_path / "plots" / f"error_by_{name}.png").read_bytes().startswith(PNG)
    changed = [row | {"relative_mse": 0.5} if row["method"] == "pbs" else row for row in QUALITY]
    assert "| `pbs` | 0.5000 | - | - |" in write(quality=changed)[1]


def test_without_any_file_everything_is_not_measured(write, tmp_path):
    code, text = write()
    assert code == 0
    assert text.lower().count("not measured") == 9
    # Notes on another file, and a second file of the same command on another card.
    optional = {report.COMMANDS[name] for name in ("attention", "ruler_h200")}
    for command in report.COMMANDS.values():
        assert (command in text) == (command not in optional)
    assert not list(tmp_path.glob("plots/*.png"))


def test_a_picture_of_results_that_are_gone_goes_too(write, tmp_path):
    write(quality=QUALITY)
    picture = tmp_path / "plots" / "error_by_density.png"
    assert picture.exists()
    assert "error_by_density.png" not in write(quality=[])[1]
    assert not picture.exists()


def test_without_matplotlib_the_report_says_so(write, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, text = write(quality=QUALITY)
    assert code == 0
    assert "not drawn: matplotlib is not installed (`pip install 's2o-vllm[bench]'`)" in text
    assert "0.0400" in text
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("content", ["no json", "[]", '{"rows": [1]}', '{"rows": 3}', "{}"])
def test_a_file_that_is_no_result_file_is_named(write, capsys, content):
    assert write(ruler=content) == (2, None)
    assert capsys.readouterr().err.strip().endswith("ruler.json is not a result file")


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "must be a folder" in capsys.readouterr().err


def test_times_are_joined_by_shape_context_ranking_and_budget():
    place = ("qwen2.5-coder-1.5b", "essays", 16384)
    rows = [row for row in QUALITY if row["unit"] == parse("served").unit and "tau" not in row]
    panels = error_by_time(rows, {"rows": ATTENTION}, report.RANKINGS)
    assert [(point.method, point.budget, point.x) for point in panels[place]] == [
        ("served", 0.05, 3.5)
    ]
    assert panels[place][0].error == pytest.approx(0.04)
    assert dense_times({"rows": ATTENTION}, [place, ("other", "essays", 16384)]) == {place: 9.5}
    assert error_by_time(rows, None, report.RANKINGS) == {}
    timed = [row | {"attention_ms": 2.0 + row["layer"]} for row in rows]
    panels = error_by_time(timed, {"rows": ATTENTION}, report.RANKINGS)
    assert {(point.budget, point.x) for point in panels[place]} == {(0.05, 2.5), (0.1, 2.0)}


def test_pictures_leave_out_what_visits_everything():
    panels = error_by_density([quality_row("pbs", 1.0, 3e-14), quality_row("pbs", 0.1, 0.05)])
    (points,) = partial(panels).values()
    assert [point.budget for point in points] == [0.1]
    assert partial(error_by_density([quality_row("pbs", 1.0, 3e-14)])) == {}


def mean_row(context, budget, difference, setting="", **changes):
    bounds = (
        {"difference_low": difference - 1, "difference_high": difference + 2} if difference else {}
    )
    return {
        "model": "qwen2.5-coder-1.5b", "context": context, "task": "mean", "backend": "s2o",
        "budget": budget, "setting": setting, "difference": difference, **bounds, **changes,
    }  # fmt: skip


def time_row(ranking, budget, total, **changes):
    place = {"shape": "qwen2.5-1.5b", "context": 32768, "ranking": ranking, "budget": budget}
    return {**place, "kv_dtype": "bf16", "total_ms": total, "fa3_paged_ms": 12.0, **changes}


def test_fidelity_and_speed_are_joined_by_model_context_ranking_and_budget():
    rows = [
        mean_row(32768, 0.05, -3.0),
        mean_row(32768, 0.05, -2.0, "mean_query"),
        mean_row(32768, 0.05, -1.0, "lists of 2,048"),
        mean_row(16384, 0.05, -3.0),
        mean_row(32768, 0.05, -9.0, task="vt"),
        mean_row(32768, 1.0, None),
    ]
    h100 = {"device": "H100", "rows": [
        time_row("low_rank", 0.05, 3.0, inputs="real-heads"), time_row("low_rank", 0.05, 4.0),
        time_row("low_rank", 0.05, 1.0, kv_dtype="fp8"), time_row("mean_query", 0.05, 6.0),
        time_row("low_rank", 0.1, 5.0), time_row("low_rank", 0.05, None),
    ]}  # fmt: skip
    h200 = {"device": "H200", "rows": [time_row("low_rank", 0.05, 2.0)]}
    panels, missing = fidelity_by_speed({"rows": rows}, [h100, h200], "low_rank")
    assert panels == {
        ("qwen2.5-coder-1.5b", 32768, "end"): {
            ("low_rank", "H100"): [(0.05, 4.0, -3.0, -4.0, -1.0)],
            ("low_rank", "H200"): [(0.05, 6.0, -3.0, -4.0, -1.0)],
            ("mean_query", "H100"): [(0.05, 2.0, -2.0, -3.0, 0.0)],
        }
    }
    assert missing == [
        "qwen2.5-coder-1.5b, 32,768 tokens, budget 0.05, lists of 2,048",
        "qwen2.5-coder-1.5b, 16,384 tokens, budget 0.05",
    ]


def test_without_a_time_fidelity_is_not_drawn_and_the_report_says_which(write, tmp_path):
    write(ruler=RULER, attention=ATTENTION)
    picture = tmp_path / "plots" / "fidelity_by_speed.png"
    assert picture.exists()
    text = write(ruler=RULER, attention=[])[1]
    assert "Fidelity against speed: not measured, for no result files hold a difference" in text
    assert "has no time of the same: m, 16,384 tokens, budget 0.1." in text
    assert not picture.exists()
