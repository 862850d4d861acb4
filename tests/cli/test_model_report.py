import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES

from s2o_vllm.cli import doctor, model_report
from s2o_vllm.cli.model_report import Layers, ModelReport, ranges, sparse_share

SPARSE = None
# What S2O does in the layers of each: their number, and why they stay dense.
VERDICTS = {
    "Llama 3.1 8B": [(32, SPARSE)],
    "Qwen3 30B-A3B": [(48, SPARSE)],
    "Qwen3-Next 80B-A3B": [(36, "QwenGatedDeltaNetAttention"), (12, SPARSE)],
    "GLM-4.5-Air": [(46, SPARSE)],
    "MiniMax-M2": [(62, SPARSE)],
    "Hy3": [(80, SPARSE)],
    "Qwen3.5 27B": [(48, "QwenGatedDeltaNetAttention"), (16, SPARSE)],
    "Qwen3.5 35B-A3B": [(30, "QwenGatedDeltaNetAttention"), (10, SPARSE)],
    "Qwen3-VL 8B": [(36, SPARSE)],
    "Qwen2.5-VL 7B": [(28, SPARSE)],
    "Gemma 4 31B": [(50, "sliding_window"), (10, SPARSE)],
    "Gemma 4 26B-A4B": [(25, "sliding_window"), (5, SPARSE)],
    "Ministral 3 8B": [(34, SPARSE)],
    "MiMo-V2-Flash": [(40, "TRITON_ATTN_DIFFKV"), (8, "TRITON_ATTN_DIFFKV")],
    "gpt-oss 20B": [(12, "sliding_window"), (12, SPARSE)],
    "Gemma 3 12B": [(40, "sliding_window"), (8, SPARSE)],
    "Llama 4 Scout": [(36, "local_chunks"), (12, SPARSE)],
    "Phi-4-mini": [(32, SPARSE)],
    "Mistral Small 3": [(40, SPARSE)],
    "OLMo 3 7B": [(24, "sliding_window"), (8, SPARSE)],
    "SmolLM3 3B": [(36, SPARSE)],
    "Nemotron-H 8B": [(24, "MambaMixer2"), (4, SPARSE)],
    "Qwen2.5 1.5B": [(28, SPARSE)],
}
REFUSED = {
    "Mistral 7B 0.1": "has a sliding window of 4096 tokens, must have layers with full attention",
    "DeepSeek V3": "uses multi-head latent attention (MLA), must be a model with GQA or MHA",
}
PICTURES = [name for name, config in ARCHITECTURES.items() if "vision_config" in config]
# Billions of parameters that a token is multiplied with: as their publishers say, less embeddings
# and encoders of images.
ACTIVE = {
    "Llama 3.1 8B": 7.0, "Qwen3 30B-A3B": 2.7, "Mistral Small 3": 22.2, "GLM-4.5-Air": 12.2,
    "Llama 4 Scout": 15.1, "Qwen3-VL 8B": 6.95, "Gemma 4 26B-A4B": 3.1,
}  # fmt: skip


@pytest.fixture
def examined(tmp_path):
    """Return a function that examines a model of that name."""

    def examine(name, **options):
        from examine import import_here

        (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURES[name]))
        import_here(tmp_path)
        return model_report.examine_model(str(tmp_path), **options)

    return examine


def test_every_model_is_judged():
    assert {*VERDICTS, *REFUSED} == set(ARCHITECTURES)


def test_the_documents_table_says_the_same():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    lines = page.partition("## Models")[2].partition("## KV connectors")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")][1:]
    found = {name.strip(): layers.strip() for name, _, layers, _ in rows}
    wanted = {
        name: ", ".join(f"{count} {what or 'sparse'}" for count, what in verdict)
        for name, verdict in VERDICTS.items()
    }
    assert found == wanted | dict.fromkeys(REFUSED, "refused")


def check(name, report):
    assert report.refused is None
    found = [(group.count, group.kind or group.reason) for group in report.layers]
    assert found == VERDICTS[name]
    assert (report.share > 0) == any(what is SPARSE for _, what in found)
    if name in ACTIVE:
        assert report.parameters / 1e9 == pytest.approx(ACTIVE[name], abs=0.06)


@pytest.mark.parametrize("name", [name for name in VERDICTS if name not in PICTURES])
def test_layers_of_models_that_people_serve(examined, name):
    check(name, examined(name))


def test_layers_of_vision_language_models(tmp_path):
    """In a separate process: without torchvision they are built with a stub of it."""
    from examine import STUBS

    folders = [tmp_path / str(number) for number in range(len(PICTURES))]
    for folder, name in zip(folders, PICTURES, strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(ARCHITECTURES[name]))
    environment = dict(os.environ)
    if importlib.util.find_spec("torchvision") is None:
        environment["PYTHONPATH"] = str(STUBS)
    done = subprocess.run(
        [sys.executable, str(STUBS.parent / "examine.py"), *map(str, folders)],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    reports = json.loads(lines[0].removeprefix("FOUND "))
    for name, report in zip(PICTURES, reports, strict=True):
        layers = [Layers(**group) for group in report.pop("layers")]
        check(name, ModelReport(layers=layers, **report))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(examined, name):
    report = examined(name)
    assert REFUSED[name] in report.refused
    assert report.layers == []


def test_the_share_of_attention():
    """By hand: 2 layers, 4 heads of 64, 1,000 tokens; one of them sees 100 tokens back."""
    full = Layers(count=1, heads=4, kv_heads=2, head_dim=64)
    local = Layers(count=1, heads=4, kv_heads=2, head_dim=64, window=100, reason="sliding_window")
    work, others = 4 * 4 * 64 * 1000 * 500, 4 * 4 * 64 * 1000 * 100 + 2 * 1e6 * 1000
    assert sparse_share([full, local], 1e6, 1000) == pytest.approx(work / (work + others))
    assert sparse_share([local], 1e6, 1000) == 0
    assert sparse_share([Layers(kind="Mamba", count=3)], 0.0, 1000) == 0


def test_a_short_context_is_the_models_own(examined):
    report = examined("Qwen2.5 1.5B", tokens=1 << 20)
    assert report.tokens == 131072
    assert report.ceiling == pytest.approx(1 / (1 - report.share))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "0"), ([0, 1, 2, 4], "0 to 2, 4"), ([3, 7, 11, 15, 19], "3, 7, 11, ... 19"),
        (list(range(9)), "0 to 8"), ([*range(0, 40, 5), 38], "0, 5, 10, ..., 38"),
    ],
)  # fmt: skip
def test_ranges(numbers, text):
    assert ranges(sorted(numbers)) == text


def test_the_command_says_it_in_words(examined, tmp_path, monkeypatch, capsys):
    examined("Gemma 3 12B")
    for name in list(doctor.os.environ):
        if name.startswith("S2O_"):
            monkeypatch.delenv(name)
    assert doctor.main([str(tmp_path), "--context", "100000"]) == 0
    text = capsys.readouterr().out
    assert "Gemma3ForCausalLM, 10.8 billion parameters" in text
    assert "8 layers (5, 11, 17, ... 47): sparse; 16 query heads over 8, head_dim 256" in text
    assert "dense, the layer attends to a sliding window (sliding_window, 1024 tokens)" in text
    assert "of 100,000 tokens" in text
    assert doctor.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["layers"][1]["reason"] is None


def test_a_model_without_a_sparse_layer_is_told_to_stay_stock(examined, tmp_path, capsys):
    report = examined("MiMo-V2-Flash")
    assert report.share == 0
    text = dict(model_report.rows(report))
    assert text["  prefill"] == "no layer goes sparse: serve it stock"
    assert "attention by a backend of its own (TRITON_ATTN_DIFFKV)" in text["  layers"]


def test_a_config_may_be_named_itself(examined, tmp_path):
    report = examined("Qwen2.5 1.5B")
    assert model_report.examine_model(str(tmp_path / "config.json")) == report


def test_what_vllm_cannot_build_is_no_refusal_of_s2o(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    report = model_report.examine_model(str(tmp_path))
    assert report.refused.startswith("vLLM cannot build it here: ")


def test_a_folder_without_a_config_is_refused_in_a_sentence(tmp_path, capsys):
    assert doctor.main([str(tmp_path)]) == 1
    assert (
        f"The model is refused: There is no config.json in {tmp_path}." in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        doctor.main(["--context", "0"])
