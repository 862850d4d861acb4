import pytest

from s2o_vllm.benchmarks.speed import turns
from s2o_vllm.cost import least_new_tokens


def row(new):
    return {
        "shape": "llama-3.1-8b", "history": 32768, "new_tokens": new, "fa3_paged_ms": 3.0,
        "total_ms": 2.0, "least_new": least_new_tokens(32768, 32),
    }  # fmt: skip


def test_a_line_tells_the_ratio_and_what_a_server_decides():
    assert turns.summary(row(8192)).endswith("2.000 ms, dense   3.000 (1.50x): sparse")
    assert turns.summary(row(64)).endswith("(1.50x): dense")


@pytest.mark.parametrize(
    ("words", "error"),
    [(["--new-tokens", "9000"], "must be at most 8192"), ([], "there is no CUDA device")],
)
def test_bad_input_is_one_sentence(words, error, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        turns.main(words)
    assert ended.value.code == 2
    assert error in capsys.readouterr().err
