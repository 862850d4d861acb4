from contextlib import contextmanager

import pytest

from s2o_vllm.benchmarks.speed import arms


@pytest.fixture
def two_arms(monkeypatch):
    """Stock vLLM, 1 s to the first token, and S2O, 0.5 s below budget 1; then 10 ms a token.

    Yields what they were asked, in order: URL, budget, prompt.
    """
    asked = []

    @contextmanager
    def server(args, arm, *size):
        yield lambda: arm

    def ask(url, tokens, budget, output_tokens=arms.OUTPUT_TOKENS):
        asked.append((url, budget, tuple(tokens)))
        first = 0.5 if url == "s2o" and budget != 1 else 1.0
        chunks = [arms.Chunk(first + 0.01 * n, 1 + n) for n in range(output_tokens)]
        return arms.Timing(0.0, chunks, [sum(tokens) % 97])

    monkeypatch.setattr(arms, "server", server)
    monkeypatch.setattr(arms, "ask", ask)
    return asked
