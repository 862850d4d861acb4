"""Real heads: what they are put together of, how they are judged, and a rehearsal on a CPU."""

import argparse
import json

import pytest
import torch

from s2o_vllm.benchmarks.quality.capture import CaptureError, LayerCapture
from s2o_vllm.benchmarks.speed import attention, real_heads, sparse
from s2o_vllm.benchmarks.speed.real_heads import (
    Errors,
    KVHead,
    RealHeads,
    plan_sets,
    refuse_misfits,
)

LLAMA = {"llama-3.1-8b": (32, 8, 128)}
QWEN = {
    "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536,
    "max_position_embeddings": 131072,
}  # fmt: skip
TINY = (4, 4, 64)  # a shape: four KV heads, each with one query head
TOKENS = 600


def config(**changes):
    return argparse.Namespace(**(QWEN | changes))


def test_seven_sets_cover_all_layers_of_the_model():
    sets = plan_sets(28, 2, 8)
    assert len(sets) == 7
    assert sets[1] == [KVHead(layer, head) for layer in (1, 8, 15, 22) for head in (0, 1)]
    every = [head for own in sets for head in own]
    assert sorted(every) == [KVHead(layer, head) for layer in range(28) for head in (0, 1)]


@pytest.mark.parametrize(("layers", "sets"), [(5, 3), (1, 1)])
def test_layers_that_do_not_divide_evenly_come_again(layers, sets):
    found = plan_sets(layers, 2, 4)
    assert len(found) == sets
    assert {len(own) for own in found} == {4}
    assert {head.layer for own in found for head in own} == set(range(layers))


def test_a_model_of_the_shape_gives_a_layer_a_set():
    assert plan_sets(3, 8, 8)[2] == [KVHead(2, head) for head in range(8)]


def test_a_prompt_has_the_wanted_heads_of_the_wanted_layers():
    def marked(layer, heads):
        """``[heads, 40, 64]``; a token's numbers name its layer, its head and itself."""
        head, token = torch.arange(heads)[:, None], torch.arange(40.0)
        return (100 * layer + 10 * head + token / 64)[..., None].expand(-1, -1, 64)

    layers = [LayerCapture(n, marked(n, 6), marked(n, 2), -marked(n, 2), 0.125) for n in range(4)]
    real = RealHeads("m", "t", layers)
    own, prompt = list(real.sets((8, 4, 64), 37))[1]
    assert own == [KVHead(1, 0), KVHead(1, 1), KVHead(3, 0), KVHead(3, 1)]
    assert prompt.query.shape == (37, 8, 64)
    assert prompt.query.is_contiguous()
    # The first two of the three query heads of each KV head.
    assert prompt.query[0, :, 0].tolist() == [100, 110, 130, 140, 300, 310, 330, 340]
    assert prompt.key[0, :, 0].tolist() == [100, 110, 300, 310]
    assert prompt.value[32, :, 63].tolist() == [-100.5, -110.5, -300.5, -310.5]
    assert all(map(torch.equal, prompt.cached(), (prompt.key, prompt.value)))


def test_errors_by_hand():
    """Two layers of one KV head, two query heads each; of 52 tokens the last 50 are judged."""
    truth = torch.ones(52, 4, 64)
    out = truth.clone()
    out[:2] = 7.0  # not judged
    out[2:, :2] += 0.1  # the first layer: 0.01 of every row
    out[10, 2] += 2.0  # the second: 4 of one row of 100, 1 of another
    out[11, 3] -= 1.0
    errors = Errors()
    errors.add([KVHead(5, 0), KVHead(9, 0)], out, truth, 2)
    found = errors.columns()
    layers = found.pop("layers")
    assert [layer["layer"] for layer in layers] == [5, 9]
    assert [layer["relative_mse"] for layer in layers] == pytest.approx([0.01, 0.05])
    assert [layer["row_error_p99"] for layer in layers] == pytest.approx([0.01, 1.0])
    # Of 200 rows the two largest are the worst hundredth.
    assert found == pytest.approx(
        {"relative_mse": 0.03, "relative_mse_worst_layer": 0.05, "row_error_p99": 0.01}
    )


def test_a_layer_s_error_is_over_all_of_its_heads_and_sets():
    truth = torch.ones(8, 1, 64)
    errors = Errors()
    errors.add([KVHead(0, 0)], truth * 1.5, truth, 0)
    errors.add([KVHead(0, 1)], truth * 3 * 1.1, truth * 3, 0)
    both = (0.25 + 9 * 0.01) / (1 + 9)
    assert errors.columns()["relative_mse"] == pytest.approx(both)
    errors.add([KVHead(0, 1)], truth * 3 * 1.1, truth * 3, 0)  # again in a later set
    assert errors.columns()["relative_mse"] == pytest.approx(both)


def test_errors_do_not_depend_on_how_many_tokens_are_compared_at_a_time(monkeypatch):
    truth = torch.randn(50, 2, 64)
    out = truth + 0.1 * torch.randn_like(truth)
    whole = real_heads.squares(out, truth)
    monkeypatch.setattr(real_heads, "SLAB", 7)
    assert all(map(torch.equal, whole, real_heads.squares(out, truth)))
    expected = float((out - truth).square().sum() / truth.square().sum())
    assert real_heads.relative_mse(out, truth) == pytest.approx(expected)


def test_an_output_that_is_not_finite_is_no_result():
    truth, errors = torch.ones(4, 1, 64), Errors()
    out = truth.clone()
    out[3, 0, 1] = float("nan")
    errors.add([KVHead(0, 0)], out, truth, 0)
    with pytest.raises(ValueError, match="not finite"):
        errors.columns()


def test_rows_of_zeros_have_no_error():
    errors = Errors()
    truth = torch.cat([torch.zeros(1, 1, 64), torch.ones(3, 1, 64)])
    errors.add([KVHead(0, 0)], truth, truth, 0)
    assert errors.columns()["row_error_p99"] == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 64}, "llama-3.1-8b has a head_dim of 128, the model of 64"),
        ({"num_key_value_heads": 3}, "8 KV heads, must be a multiple of the model's 3"),
        ({"num_key_value_heads": 4}, "4 query heads a KV head, the model only 3"),
        ({"max_position_embeddings": 32768}, "made for 32768 tokens, not 131072"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(CaptureError, match=sentence):
        refuse_misfits(config(**changes), LLAMA, 131072)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 32768}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
        {"rope_parameters": {"rope_type": "default", "factor": None}},
        {"rope_parameters": None},
    ],
    ids=["as transformers 5 writes it", "as older configs do", "none", "not even that"],
)  # fmt: skip
def test_yarn_is_as_long_as_it_says(changes):
    refuse_misfits(config(**changes), LLAMA, 131072)
    with pytest.raises(CaptureError, match="made for 131072 tokens"):
        refuse_misfits(config(**changes), LLAMA, 131073)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--inputs", "real-heads"], "--inputs real-heads needs --model and --text"),
        (["--model", "m"], "--inputs real-heads needs --model and --text"),
        (["--model", "m", "--text", "t", "--kv-dtypes", "fp8"], "needs a bf16 cache"),
        (["--model", "m", "--text", "t", "--min-context", "8192"], "leaves nothing sparse"),
        (["--inputs", "nonsense"], "invalid choice"),
        (["--model", "m", "--text", "t"], "no CUDA device"),
        (["--model", "m", "--inputs", "random"], "no CUDA device"),
    ],
)
def test_what_is_missing_is_told_at_once(monkeypatch, capsys, options, told):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        attention.main(options)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ([], ["random"]),
        (["--model", "m", "--text", "t"], ["random", "real-heads"]),
        (["--model", "m", "--text", "t", "--inputs", "real-heads"], ["real-heads"]),
    ],
)
def test_inputs_unless_they_are_named(options, inputs):
    parser = attention.build_parser()
    args = parser.parse_args(options)
    attention.settle_inputs(parser, args)
    assert args.inputs == inputs


@pytest.mark.parametrize(
    ("context", "min_context", "first"),
    [(131072, 0, 8192), (131072, 20000, 20000), (8192, 0, 4096)],
)
def test_rows_are_judged_that_a_server_would_handle_sparsely(context, min_context, first):
    assert attention.judged_from(context, min_context) == first


def model(folder):
    """Write a random Qwen2 of three layers, six query heads and two KV heads, and its text."""
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    characters = {chr(number): number for number in range(33, 127)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(characters, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    made = transformers.Qwen2Config(
        vocab_size=128, hidden_size=384, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    network = transformers.Qwen2ForCausalLM(made).bfloat16()
    with torch.no_grad():  # else all keys are alike to every query
        for layer in network.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.mul_(8)
    network.save_pretrained(folder)
    ids = torch.randint(33, 127, (TOKENS + 100,))
    text = folder / "words.txt"
    text.write_text("".join(map(chr, ids)))
    return text, ids[:TOKENS], network


@torch.no_grad()
def test_what_is_read_is_what_the_model_computes(tmp_path):
    text, ids, network = model(tmp_path)
    real = RealHeads.read(tmp_path, text, TOKENS, {"tiny": TINY}, "cpu")
    assert (real.model, real.text, len(real.layers)) == (tmp_path.name, "words", 3)
    cache = network(ids[None], use_cache=True).past_key_values
    for own, prompt in real.sets(TINY, 100):
        assert prompt.query.shape == (100, 4, 64)
        for place, (layer, head) in enumerate(own):
            key = cache.layers[layer].keys[0, head, :100]
            assert real_heads.relative_mse(prompt.key[:, place, None], key[:, None]) < 0.01


@pytest.fixture
def no_card(monkeypatch):
    """Let the command take the CPU for a card, and a tiny shape for Llama's."""
    read = RealHeads.read
    monkeypatch.setattr(RealHeads, "read", lambda *args: read(*args[:-1], "cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(attention, "header", lambda: {"device": "a CPU"})
    monkeypatch.setitem(attention.SHAPES, "llama-3.1-8b", TINY)


@pytest.mark.parametrize("missing", ["text", "model", "tokens"])
def test_what_is_not_there_is_one_sentence(tmp_path, capsys, no_card, missing):
    text, *_ = model(tmp_path)
    folder = tmp_path / "none" if missing == "model" else tmp_path
    text = tmp_path / "none.txt" if missing == "text" else text
    options = ["--inputs", "real-heads", "--model", str(folder), "--text", str(text)]
    assert attention.main([*options, "--contexts", "1000" if missing == "tokens" else "500"]) == 2
    told = {"text": "no text file", "model": "no model at", "tokens": "fewer than the context"}
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("s2o bench attention: ")
    assert told[missing] in error


class OnCPU(sparse.Sparse):
    """Runs the references, which leave no lists behind."""

    def visits(self, first=0):
        self.counters.zero_()
        self.run()
        visited, eligible, _, _, dropped, sampled = self.counters.tolist()
        mass = sparse.DROPPED_UNIT * dropped / max(1, sampled)
        return sparse.Visits(visited / eligible, 1e12, 1e9, mass)


def causal(prompt):
    """Return dense attention ``[tokens, heads, head_dim]``."""
    query, key, value = (x.transpose(0, 1)[None] for x in (prompt.query, prompt.key, prompt.value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.fixture
def rehearsal(tmp_path, monkeypatch, no_card):
    """The command's arguments; times are invented, tensors and errors are computed."""
    text, *_ = model(tmp_path)
    monkeypatch.setattr(attention, "ceilings", lambda: {"matmul_tflops": 1e3, "copy_gb_s": 4e3})
    monkeypatch.setattr(attention, "check", lambda *args: {"error": 0.0, "torch_error": 0.0})
    monkeypatch.setattr(attention, "Sparse", OnCPU)
    monkeypatch.setattr(
        attention, "baselines",
        lambda prompt: {kind: lambda: causal(prompt) for kind in ("fa3_paged", "fa3", "fa2")},
    )  # fmt: skip
    monkeypatch.setattr(attention, "milliseconds", lambda run, repeat_ms=0: (run(), 8.0)[1])
    monkeypatch.setattr(sparse, "milliseconds", lambda run, repeat_ms=0: 2.0)
    monkeypatch.setattr(sparse, "in_turn", lambda *runs, repeat_ms=0: [1.0 for _ in runs])
    out = tmp_path / "attention.json"
    options = [
        "--inputs", "real-heads", "--model", tmp_path, "--text", text, "--contexts", 320, TOKENS,
        "--rankings", "mean_query", "--segment", 64, "--budgets", 0.1, 0.5, "--out", out,
        "--plot", tmp_path / "attention.png",
    ]  # fmt: skip
    return [str(option) for option in options], out


def test_the_whole_run_rehearsed(rehearsal, capsys):
    options, out = rehearsal
    assert attention.main(options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["context"], row["budget"]) for row in rows] == [
        (320, 0.1), (320, 0.5), (TOKENS, 0.1), (TOKENS, 0.5),
    ]  # fmt: skip
    for row in rows:
        assert (row["inputs"], row["text"], row["sets"]) == ("real-heads", "words", 2)
        assert (row["ranking"], row["segment"], row["kv_dtype"]) == ("mean_query", 64, "bf16")
        assert row["judged_from"] == row["context"] // 2
        assert [layer["layer"] for layer in row["layers"]] == [0, 1, 2]
        assert 0 < row["relative_mse"] <= row["relative_mse_worst_layer"] < row["row_error_p99"]
        assert row["dense_mode_mse"] < 1e-4, "two dense attentions in bf16"
        assert (row["total_ms"], row["fa3_paged_ms"], row["dense_mode_ms"]) == (2.0, 8.0, 8.0)
        assert 0 < row["dropped_mass"] < 1
    for few, many in (rows[:2], rows[2:]):
        for measure in ("relative_mse", "row_error_p99", "dropped_mass"):
            assert few[measure] > many[measure], measure
    printed = capsys.readouterr().out
    assert f"captured 3 layers of {out.parent.name} on 600 tokens of words" in printed
    assert "; real heads: relative MSE 0." in printed


def test_a_dense_mode_that_is_wrong_ends_the_run(rehearsal, monkeypatch):
    options, out = rehearsal
    monkeypatch.setattr(
        attention, "baselines",
        lambda prompt: {kind: lambda: causal(prompt) * 1.1 for kind in ("fa3_paged", "fa2")},
    )  # fmt: skip
    with pytest.raises(SystemExit, match="differs by"):
        attention.main(options)
    assert not out.exists()
