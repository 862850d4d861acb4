import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from s2o_vllm.benchmarks.quality.capture import CaptureError, CaptureSpec, capture, load

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A random Llama of three layers with a byte tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {chr(i): i for i in range(32, 127)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="?"))
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_type": "llama"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, twice. " * 4)
    return CaptureSpec(folder, text, 96, (0, 2), dtype="fp32", chunk=32)


def test_chunks_do_not_change_what_is_captured(spec, tmp_path):
    capture(spec, tmp_path / "chunks")
    whole = replace(spec, chunk=96)
    capture(whole, tmp_path / "whole")
    for layer in spec.layers:
        a, b = load(spec, tmp_path / "chunks", layer), load(whole, tmp_path / "whole", layer)
        assert a.q.shape == (4, 96, 16)
        assert a.k.shape == a.v.shape == (2, 96, 16)
        assert a.scale == pytest.approx(0.25)
        for name in ("q", "k", "v"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-4)


def test_captured_keys_are_those_of_the_model(spec, tmp_path):
    capture(spec, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
    ids = tokenizer(spec.text.read_text(), add_special_tokens=False)["input_ids"][:96]
    cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    torch.testing.assert_close(
        load(spec, tmp_path, 2).k, cache.layers[2].keys[0], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        load(spec, tmp_path, 0).v, cache.layers[0].values[0], atol=1e-5, rtol=1e-4
    )


def test_cached_layers_are_not_captured_again(spec, tmp_path):
    capture(replace(spec, layers=(0,)), tmp_path)
    file = spec.file(tmp_path, 0)
    before = file.stat().st_mtime_ns
    capture(spec, tmp_path)
    assert file.stat().st_mtime_ns == before
    assert set(load_file(spec.file(tmp_path, 2))) == {"q", "k", "v", "scale"}


def test_yarn_has_its_own_files_and_keys(spec, tmp_path):
    scaled = replace(spec, yarn=4.0, layers=(0,))
    capture(replace(spec, layers=(0,)), tmp_path)
    capture(scaled, tmp_path)
    assert scaled.file(tmp_path, 0) != spec.file(tmp_path, 0)
    assert not torch.equal(load(scaled, tmp_path, 0).k, load(spec, tmp_path, 0).k)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context": 100_000}, "fewer than the context of 100000"),
        ({"context": 0}, "at least 1 token"),
        ({"layers": (0, 9)}, "Layers must be between 0 and 2, not 0, 9"),
    ],
)
def test_what_is_not_there_is_named(spec, tmp_path, change, sentence):
    with pytest.raises(CaptureError, match=sentence):
        capture(replace(spec, **change), tmp_path)


def test_missing_files_are_named(spec, tmp_path):
    with pytest.raises(CaptureError, match="no model"):
        capture(replace(spec, model=tmp_path), tmp_path)
    with pytest.raises(CaptureError, match="no text file"):
        capture(replace(spec, text=tmp_path / "none.txt"), tmp_path)
