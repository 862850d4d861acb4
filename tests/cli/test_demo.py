import sys

import pytest

from s2o_vllm.cli import demo


def test_the_prompt_hides_one_fact_far_from_the_question():
    prompt = demo.long_prompt()
    assert prompt.count(demo.FACT) == 1
    assert 0.7 < prompt.index(demo.FACT) / len(prompt) < 0.8
    assert prompt.endswith(demo.OPENING)
    assert demo.FACT.startswith(demo.OPENING)
    assert len(prompt.split()) > 4000
    assert prompt == demo.long_prompt()
    sentences = prompt.split("\n")[0].split(". ")
    assert len(set(sentences)) > 0.95 * len(sentences)


def test_a_taken_port_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(demo, "read", lambda url: "")
    monkeypatch.setattr(demo, "launch", lambda *args: pytest.fail("started a server"))
    assert demo.main(["--port", "8000"]) == 2
    assert "port 8000 is taken" in capsys.readouterr().err


def test_unknown_flags_go_to_the_server(monkeypatch):
    seen = []

    def start(command, log):
        seen.append(command)
        return launch([sys.executable, "-c", "raise SystemExit(1)"], log)

    launch = demo.launch
    monkeypatch.setattr(demo, "read", lambda url: None)
    monkeypatch.setattr(demo, "launch", start)
    assert demo.main(["--once", "--port", "8009", "--s2o-sparsity-budget", "0.5"]) == 1
    words = ["serve", "--s2o-sparsity-budget", "0.5", "--port", "8009"]
    assert seen == [[sys.executable, "-P", "-m", "s2o_vllm.cli", *words]]


def test_what_is_reported(monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.setattr(demo, "ask", lambda url, prompt: demo.Answer("7429.", 5000, 1.5, 2.0))
    monkeypatch.setattr(demo, "read", lambda url: "")
    monkeypatch.setattr(demo, "measured_density", lambda url, before: 0.2501)
    demo.report("http://server")
    text = capsys.readouterr().out
    assert "Answer:              The magic number of the lighthouse is 7429.\n" in text
    assert "Prompt:              5,000 tokens\n" in text
    assert "Time to first token: 1.50 s\n" in text
    assert "Density:             0.250 " in text
