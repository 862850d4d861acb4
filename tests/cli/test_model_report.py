import json
from pathlib import Path

import pytest
from architectures import ARCHITECTURES

from s2o_vllm.cli import doctor, model_report
from s2o_vllm.cli.model_report import Layers, ranges, sparse_share

SPARSE = None
# What S2O does in the layers of each: their number, and why they stay dense.
VERDICTS = {
    "Llama 3.1 8B": [(32, SPARSE)],
    "Qwen3 30B-A3B": [(48, SPARSE)],
    "Qwen3-Next 80B-A3B": [(36, "QwenGatedDeltaNetAttention"), (12, SPARSE)],
    "GLM-4.5-Air": [(46, SPARSE)],
    "MiniMax-M2": [(62, SPARSE)],
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
# Billions of parameters that a token is multiplied with, as their publishers say, less embeddings.
ACTIVE = {"Llama 3.1 8B": 7.0, "Qwen3 30B-A3B": 2.7, "Mistral Small 3": 22.2, "GLM-4.5-Air": 12.2}


@pytest.fixture
def examined(tmp_path):
    """Return a function that examines a model of that name."""

    def examine(name, **options):
        from vllm.model_executor.models.registry import ModelRegistry

        config = ARCHITECTURES[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        # As vLLM finds it, but not in a process of its own, which takes a quarter of a minute.
        (architecture,) = config["architectures"]
        known = ModelRegistry.models[architecture].load_model_cls()
        ModelRegistry.register_model(architecture, known)
        return model_report.examine_model(str(tmp_path), **options)

    return examine


def test_every_model_is_judged():
    assert {*VERDICTS, *REFUSED} == set(ARCHITECTURES)


def test_the_documents_table_says_the_same():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    lines = page.partition("## Models")[2].partition("## KV connectors")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")][1:]
    found = {name.strip(): layers.strip() for name, _, layers in rows}
    wanted = {
        name: ", ".join(f"{count} {what or 'sparse'}" for count, what in verdict)
        for name, verdict in VERDICTS.items()
    }
    assert found == wanted | dict.fromkeys(REFUSED, "refused")


@pytest.mark.parametrize("name", VERDICTS)
def test_layers_of_models_that_people_serve(examined, name):
    report = examined(name)
    assert report.refused is None
    found = [(group.count, group.kind or group.reason) for group in report.layers]
    assert found == VERDICTS[name]
    assert (report.share > 0) == any(what is SPARSE for _, what in found)
    if name in ACTIVE:
        assert report.parameters / 1e9 == pytest.approx(ACTIVE[name], abs=0.06)


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


def test_a_folder_without_a_config_is_refused_in_a_sentence(tmp_path, capsys):
    assert doctor.main([str(tmp_path)]) == 1
    assert (
        f"The model is refused: There is no config.json in {tmp_path}." in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        doctor.main(["--context", "0"])
