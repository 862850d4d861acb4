"""No page or log of a server shows what it was asked."""

import contextlib
import urllib.request

import openai
import pytest

pytestmark = pytest.mark.e2e

MARK = "quokka-7431"


def test_no_prompt_is_logged_or_shown(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    text = f"{MARK} " * 1500

    def ask(words, **xargs):
        message = {"role": "user", "content": words}
        return client.chat.completions.create(
            model=server.model, messages=[message], max_tokens=2, user=MARK,
            extra_body={"vllm_xargs": xargs, "cache_salt": MARK},
        )  # fmt: skip

    assert ask(text, s2o_sparsity_budget=0.2).usage.prompt_tokens >= 1500
    refused = [
        {"s2o_sparsity_budget": 2}, {"s2o_sparsity_budget": "lots"}, {"s2o_budget": 0.1},
        {"sparsity_budget": 0.1},
    ]  # fmt: skip
    for xargs in refused:
        with pytest.raises(openai.BadRequestError) as error:
            ask(text, **xargs)
        assert "s2o: " in error.value.body["message"]
        assert MARK not in error.value.body["message"]
    with contextlib.suppress(openai.BadRequestError):
        ask(text * 9)  # too long
    server.settled(("s2o:sparse_requests",))
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    assert "s2o:sparse_requests_total" in page
    assert MARK not in page
    log = server.log.read_text()
    assert "/v1/chat/completions" in log
    assert [line for line in log.splitlines() if MARK in line] == []
