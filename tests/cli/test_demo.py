import sys
from types import SimpleNamespace

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
    asked = []

    def ask(url, prompt, budget=None):
        asked.append((prompt, budget))
        return demo.Answer("7429.", 5000, 1.25 if budget else 1.5, 2.0)

    monkeypatch.setattr(demo, "ask", ask)
    monkeypatch.setattr(demo, "read", lambda url: "")
    monkeypatch.setattr(demo, "measured_density", lambda url, before: 0.2501)
    demo.report("http://server")
    assert asked[1:] == [(demo.long_prompt(), None), (demo.long_prompt(), 1.0)]
    assert asked[0][0][:100] != asked[1][0][:100], "nothing of it is cached"
    text = capsys.readouterr().out
    assert "Answer:              The magic number of the lighthouse is 7429.\n" in text
    assert "Prompt:              5,000 tokens\n" in text
    assert "Time to first token: 1.50 s\n" in text
    assert (
        "Stock attention:     1.25 s for the same prompt on the same server, at a budget of 1: "
        "S2O took 1.20 times that\n" in text
    )
    assert "Density:             0.250 " in text


PAGE = """# TYPE s2o:dense_rows_total counter
s2o:dense_rows_total{engine="0",model_name="m",reason="few_new_tokens"} %d
s2o:dense_rows_total{engine="0",model_name="m",reason="end_of_prompt"} 7
"""


@pytest.mark.parametrize(("counted", "faster"), [(2, True), (1, False)])
def test_a_prompt_that_ran_dense_is_said_to_and_why(monkeypatch, capsys, counted, faster):
    pytest.importorskip("openai")
    pages = [PAGE % 1, PAGE % counted]
    monkeypatch.setattr(demo, "ask", lambda *arguments: demo.Answer("7429.", 5000, 1.5, 2.0))
    monkeypatch.setattr(demo, "read", lambda url: pages.pop(0))
    monkeypatch.setattr(demo, "measured_density", lambda url, before: None)
    demo.report("http://server")
    text = capsys.readouterr().out
    assert (
        "Stock attention:     1.50 s for the same prompt on the same server, at a budget of 1: "
        "both times are stock attention's, and differ by chance\n" in text
    )
    assert "S2O took" not in text
    assert "Density:             no history was attended sparsely: this prompt ran dense" in text
    assert ("faster on this device (--s2o-dense-where-faster false ranks it)\n" in text) is faster


def test_the_budget_is_sent(monkeypatch):
    openai = pytest.importorskip("openai")
    sent = []
    client = SimpleNamespace(
        models=SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="m")])),
        completions=SimpleNamespace(create=lambda **body: sent.append(body["extra_body"]) or []),
    )
    monkeypatch.setattr(openai, "OpenAI", lambda **arguments: client)
    demo.ask("http://server", "text")
    demo.ask("http://server", "text", demo.STOCK)
    assert sent == [{"vllm_xargs": {}}, {"vllm_xargs": {"s2o_sparsity_budget": 1.0}}]
