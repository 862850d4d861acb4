import json

import pytest
import torch
from safetensors.torch import save_file

from s2o_vllm.benchmarks.quality import evaluate
from s2o_vllm.benchmarks.quality.capture import CaptureSpec
from s2o_vllm.benchmarks.quality.methods import METHODS, parse, settings


@pytest.fixture
def arguments(tmp_path):
    """Options over a capture that is already there; no model runs."""
    model, text = tmp_path / "tiny", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text("{}")
    text.write_text("unused")
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        file = CaptureSpec(model, text, 1536, (layer,)).file(tmp_path / "cache", layer)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "q": torch.randn(4, 1536, 32, generator=generator).bfloat16(),
            "k": torch.randn(2, 1536, 32, generator=generator).bfloat16(),
            "v": torch.randn(2, 1536, 32, generator=generator).bfloat16(),
            "scale": torch.tensor(32**-0.5),
        }
        save_file(tensors, file)
    places = ["--model", model, "--text", text, "--cache", tmp_path / "cache"]
    sizes = ["--context", 1536, "--layers", "0,1", "--segment", 512, "--densities", "0.1,0.5"]
    return [str(word) for word in (*places, *sizes, "--out", tmp_path / "out" / "quality.json")]


def read(arguments):
    with open(arguments[-1], encoding="utf-8") as file:
        return json.load(file)


def test_every_method_is_measured(arguments, capsys):
    assert evaluate.main([*arguments[:-2], "--methods", *METHODS, *arguments[-2:]]) == 0
    result = read(arguments)
    assert {"device", "torch", "triton", "vllm", "commit", "date", "rows"} == set(result)
    rows = result["rows"]
    assert len(rows) == 2 * 2 * 2 * len(METHODS)  # layers, positions, densities
    by_method = {row["method"]: row for row in rows if row["budget"] == 0.5}
    assert set(by_method) == set(METHODS)
    for row in rows:
        assert 0 < row["density"] <= 1
        assert row["relative_mse"] > 0
        assert 0 < row["dropped_mass"] <= row["dropped_mass_max"] <= 1
        assert row["attention_ms"] is None
    fewer = {row["method"]: row for row in rows if row["budget"] == 0.1}
    for row in by_method.values():
        # The same last layer and position: five times the tokens leave less out, by any ranking.
        # Summaries have much of it already where keys are random.
        most = 0.8 if row["settings"]["correction"] == "none" else 0.9
        assert row["relative_mse"] < most * fewer[row["method"]]["relative_mse"], row
        assert row["dropped_mass"] < 0.7 * fewer[row["method"]]["dropped_mass"], row
        assert row["density"] == pytest.approx(0.5, abs=0.1)
        if row["settings"]["correction"] == "none":
            assert row["relative_mse"] > 0.9 * by_method["token_oracle"]["relative_mse"]
    assert f"{len(rows)} rows" in capsys.readouterr().out


def test_a_second_run_measures_only_what_is_new(arguments, monkeypatch):
    measured = []
    monkeypatch.setattr(
        evaluate,
        "judge",
        lambda segment, method, rows, judge=evaluate.judge: (
            measured.append((method.name, len(rows))) or judge(segment, method, rows)
        ),
    )
    evaluate.main([*arguments, "--methods", "s2o_paper"])
    first = read(arguments)["rows"]
    measured.clear()
    evaluate.main([*arguments, "--methods", "s2o_paper", "pbs"])
    assert {name for name, count in measured if count} == {"pbs"}
    assert read(arguments)["rows"][: len(first)] == first


def test_early_stop_rows_name_their_threshold(arguments):
    evaluate.main([*arguments, "--methods", "s2o_paper", "--taus", "0.5,0.0001"])
    rows = [row for row in read(arguments)["rows"] if row["budget"] == 0.5]
    assert {row.get("tau") for row in rows} == {None, 0.5, 0.0001}
    assert all(row["density"] <= 0.5 + 1e-3 for row in rows)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--methods", "magic"],
            "There is no method 'magic'; there are served, mean_query, s2o,",
        ),
        (["--methods", "s2o:rnk=3"], "s2o has no setting 'rnk=3'"),
        (["--methods", "s2o:rank=many"], "s2o's rank must be a number, not 'many'."),
        (["--methods", "s2o:unit=7xkv"], "units of 7 queries do not divide"),
        (["--methods", "s2o:precision=int4"], "precision must be fp32 or fp8, not int4"),
        (["--layers", "two"], "--layers must be numbers"),
        (["--densities", "0"], "--densities must be above 0"),
        (["--positions", "2"], "--positions must be above 0"),
        (["--stop-step", "0"], "--stop-step must be at least 1."),
        (["--segment", "1024"], "has no history"),
        (["--text", "nowhere.txt"], "There is no text file nowhere.txt."),
        (["--model", "nowhere"], "There is no model at nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(arguments, capsys, words, sentence):
    assert evaluate.main([*arguments, *words]) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("s2o eval attention:")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in error


def test_a_spec_sets_what_it_names_and_nothing_else():
    method = parse("lowrank:unit=32xkv,rank=16,reduce=max-lse")
    assert (method.unit, method.rank, method.reduce) == ("32xkv", 16, "max-lse")
    defaults = settings(parse("lowrank"))
    changed = {key for key, value in settings(method).items() if value != defaults[key]}
    assert changed == {"rank", "reduce"}
