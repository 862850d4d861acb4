"""Where requests enter vLLM: batch files and beam search."""

import json
from types import SimpleNamespace

import pytest

from s2o_vllm import request_hooks
from s2o_vllm.config import ConfigError, S2OConfig
from s2o_vllm.http_check import settings_of_request
from s2o_vllm.requests import of_context
from s2o_vllm.wrapping import wrap

SERVER = S2OConfig(sparsity_budget=0.2, max_request_budget=0.5)
CONFIG = SimpleNamespace(additional_config={"s2o": SERVER.as_dict()})


@pytest.fixture(scope="module")
def lines():
    """vLLM's class of a batch file's lines, with its settings kept as they are."""
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    class Line(BatchRequestInput):
        pass

    wrap(Line, "model_validate_json", request_hooks._read_batch_line, static=True)
    return Line


def line(url="/v1/chat/completions", **body):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | body
    return json.dumps({"custom_id": "1", "method": "POST", "url": url, "body": body})


@pytest.mark.parametrize("value", [True, False, 1, 0.3, "lots"])
def test_a_batch_line_keeps_its_settings_as_they_are(lines, value):
    asked = {"s2o_sparsity_budget": value, "other": 3}
    body = lines.model_validate_json(line(vllm_xargs=asked)).body
    kept = body.vllm_xargs["s2o_sparsity_budget"]
    assert (type(kept), kept) == (type(value), value)
    assert body.vllm_xargs["other"] == 3


def test_a_batch_line_that_asks_for_nothing_is_vllms_own(lines):
    assert lines.model_validate_json(line()).body.vllm_xargs is None
    scored = line("/v1/embeddings", input="x")
    assert lines.model_validate_json(scored).url == "/v1/embeddings"


def test_true_is_no_budget_in_a_batch_line(lines):
    body = lines.model_validate_json(line(vllm_xargs={"s2o_sparsity_budget": True})).body
    with pytest.raises(ConfigError, match="s2o_sparsity_budget is True, must be a number"):
        settings_of_request({"vllm_xargs": body.vllm_xargs}, SERVER)


def search(**attributes):
    """What beams ask for inside of a search, and what is asked for after it."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=3)
    for key, value in attributes.items():
        setattr(params, key, value)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=CONFIG))
    before = of_context.get()
    inside = request_hooks._beam_search(lambda *_: of_context.get(), llm, ["x"], params)
    assert of_context.get() == before, "the next call asks for nothing of this one's"
    return inside


def test_beams_ask_for_what_their_parameters_ask_for():
    assert search(extra_args={"s2o_sparsity_budget": 0.4}) == {"sparsity_budget": 0.4}
    assert search() == {}


@pytest.mark.parametrize(("value", "allowed"), [(0.9, "at most 0.5 on"), ("lots", "a number")])
def test_a_budget_of_beams_is_checked(value, allowed):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"s2o_sparsity_budget is .*, must be {allowed}"):
        search(extra_args={"s2o_sparsity_budget": value})
