"""What requests ask for: settings, budgets and prefix-cache salts."""

import math

import pytest

from s2o_vllm import requests
from s2o_vllm.config import ConfigError, S2OConfig
from s2o_vllm.requests import RequestInfo


def test_request_settings():
    assert requests.request_settings(None) == {}
    assert requests.request_settings({"other": "x"}) == {}
    asked = requests.request_settings({"s2o_sparsity_budget": 1, "s2o_target_error": 0.02})
    assert asked == {"sparsity_budget": 1.0, "target_error": 0.02}
    server = S2OConfig(sparsity_budget=0.3, target_error=0.1, min_budget_tokens=700)
    assert requests.budget_of(RequestInfo({}, 0), server) == (0.3, 0.1, 0, 700)
    assert requests.budget_of(RequestInfo({"target_error": 0.0}, 0), server) == (0.3, 0.0, 0, 700)
    assert requests.budget_of(RequestInfo(asked, 500), server) == (1.0, 0.02, 500, 700)


@pytest.mark.parametrize("value", ["0.1", [0.1], 0, 2, math.nan, True, None])
def test_malformed_request_budget_is_refused(value):
    with pytest.raises(ConfigError, match="s2o_sparsity_budget is "):
        requests.request_settings({"s2o_sparsity_budget": value})


@pytest.mark.parametrize("value", ["0.1", [0.1], -0.1, 1, math.nan, True, None])
def test_malformed_target_error_is_refused(value):
    with pytest.raises(ConfigError, match=r"s2o_target_error is .*, must be a number from 0 "):
        requests.request_settings({"s2o_target_error": value})
    with pytest.raises(ConfigError, match=r"s2o: target_error is .*, must be a number from 0 "):
        S2OConfig(target_error=value)


def test_a_request_may_ask_for_as_much_as_the_server_allows():
    server = S2OConfig(max_request_budget=0.25)
    for value in (0.05, 0.25):
        asked = requests.request_settings({"s2o_sparsity_budget": value}, server)
        assert asked == {"sparsity_budget": value}
    with pytest.raises(ConfigError, match=r"s2o_sparsity_budget is 0.3, must be at most 0.25 on"):
        requests.request_settings({"s2o_sparsity_budget": 0.3}, server)


@pytest.mark.parametrize("value", [0.05, 1])
def test_a_server_that_allows_no_budgets_of_requests(value):
    server = S2OConfig(max_request_budget=0)
    assert requests.request_settings({"other": value}, server) == {}
    with pytest.raises(ConfigError, match="must be left out: this server allows no budget"):
        requests.request_settings({"s2o_sparsity_budget": value}, server)


def test_unknown_request_setting_is_refused():
    with pytest.raises(
        ConfigError, match=r"'s2o_budget', must be s2o_sparsity_budget or s2o_target_error$"
    ):
        requests.request_settings({"s2o_budget": 0.1})


def test_cache_salts_differ_exactly_where_the_kv_cache_does():
    server = S2OConfig(sparsity_budget=0.1)
    default = requests.cache_salt(None, server, {})
    assert requests.cache_salt(None, server, {"sparsity_budget": 0.1}) == default
    assert requests.cache_salt(None, server, {"sparsity_budget": 0.2}) != default
    assert requests.cache_salt("tenant", server, {}) != default
    other = S2OConfig(sparsity_budget=0.1, min_context=1)
    assert requests.cache_salt(None, other, {}) != default
    capped = S2OConfig(sparsity_budget=0.1, max_request_budget=0.5)
    assert requests.cache_salt(None, capped, {}) == default
    watched = S2OConfig(sparsity_budget=0.1, shadow_rate=0.5, shadow_limit=0.3)
    assert requests.cache_salt(None, watched, {}) == default
    some_dense = S2OConfig(sparsity_budget=0.1, dense_layers=(0,))
    assert requests.cache_salt(None, some_dense, {}) != default
    assert requests.cache_salt(None, server, {"target_error": 0.1}) != default
    one = {"sparsity_budget": 1.0}
    # Dense is dense, whatever the other settings.
    assert requests.cache_salt(None, server, one) == requests.cache_salt(None, other, one)
    # What says nothing of keys and values is left out, and a default is what it stands for.
    spelt = S2OConfig(sparsity_budget=0.1, segment_size=64, decode_requests=7, status_page=True)
    assert requests.cache_salt(None, spelt, {}) == default
    decoding = [S2OConfig(decode_budget=0.1, decode_requests=count) for count in (1, 2)]
    assert len({requests.cache_salt(None, config, {}) for config in decoding}) == 2


def test_settings_touch_no_token_before_min_context():
    def parts(config, asked=None, salt=None):
        return requests.split_salt(requests.cache_salt(salt, config, asked or {}))

    one, other = parts(S2OConfig(min_context=512)), parts(S2OConfig(min_context=512), {
        "sparsity_budget": 0.3})  # fmt: skip
    assert one.own == other.own == "|s2o:prefix"
    assert one.shared == other.shared == 512
    assert one.mark != other.mark
    assert parts(S2OConfig(), salt="tenant").own == "tenant|s2o:prefix"
    assert parts(S2OConfig(decode_budget=0.5, decode_min_context=100)).shared == 100
    assert parts(S2OConfig(decode_min_context=100)).shared == 8192
    assert parts(S2OConfig(), {"sparsity_budget": 1.0}) is None
    for foreign in (None, "", "tenant", "a|s2o:prefix@8:b|s2o:dense", "|s2o:prefix@x:b"):
        assert requests.split_salt(foreign) is None
    # A user who writes our words gets no other's salt: what is ours stands last.
    mine = "a|s2o:prefix@0:b"
    assert parts(S2OConfig(), salt=mine).own == f"{mine}|s2o:prefix"
    assert parts(S2OConfig(), {"sparsity_budget": 1.0}, mine) is None


def test_a_target_error_is_refused_by_a_server_with_mean_query():
    server = S2OConfig(ranking="mean_query")
    assert requests.request_settings({"s2o_target_error": 0}, server) == {"target_error": 0.0}
    with pytest.raises(ConfigError, match=r"s2o_target_error is 0.1, must be 0 with ranking"):
        requests.request_settings({"s2o_target_error": 0.1}, server)
