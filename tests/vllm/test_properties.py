"""Whatever is given as a setting is accepted if it is valid, or refused in one sentence."""

import argparse
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s2o_vllm.config import FIELDS, FLAGS, KEY, RANKINGS, ConfigError, S2OConfig, resolve, settle
from s2o_vllm.flags import add_flags
from s2o_vllm.http_check import settings_in
from s2o_vllm.requests import OF_REQUESTS, PREFIX, request_settings

SERVER = S2OConfig(sparsity_budget=0.2, max_request_budget=0.5)

numbers = st.integers() | st.integers(-3, 3) | st.floats() | st.floats(-0.5, 1.5)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from([*RANKINGS])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
HUGE = 10**400  # larger than any float


def a_number(value, low, high, *, or_low=False, or_high=False):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low < value < high or (or_low and value == low) or (or_high and value == high)


def whole(value, low, high=math.inf):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


VALID = {
    "sparsity_budget": lambda v: a_number(v, 0, 1, or_high=True),
    "target_error": lambda v: a_number(v, 0, 1, or_low=True),
    "stop_threshold": lambda v: a_number(v, 0, 1, or_low=True),
    "max_request_budget": lambda v: a_number(v, 0, 1, or_low=True, or_high=True),
    "decode_budget": lambda v: a_number(v, 0, 1, or_high=True),
    "min_budget_tokens": lambda v: whole(v, 0),
    "min_context": lambda v: whole(v, 0),
    "decode_min_context": lambda v: whole(v, 0),
    "decode_requests": lambda v: whole(v, 1, 256),
    "segment_size": lambda v: whole(v, 16, 4096) or whole(v, 0, 0),
    "ranking": lambda v: isinstance(v, str) and v in RANKINGS,
    "dense_where_faster": lambda v: isinstance(v, bool),
    "self_test": lambda v: isinstance(v, bool),
    "status_page": lambda v: isinstance(v, bool),
    "shadow_rate": lambda v: a_number(v, 0, 1, or_low=True, or_high=True),
    "shadow_limit": lambda v: a_number(v, 0, 10, or_low=True, or_high=True),
    "dense_layers": lambda v: (
        isinstance(v, list) and all(whole(one, -math.inf) for one in v)
    ),
}  # fmt: skip


def sentence(error, *parts):
    """Return what a refusal says, which is one short line that names these."""
    text = str(error)
    assert text.startswith("s2o: ")
    assert "\n" not in text
    assert len(text) < 600
    assert all(part in text for part in parts), text
    return text


def test_every_setting_has_a_property():
    assert set(VALID) == set(FIELDS)


@given(key=st.sampled_from([*FIELDS]), value=values)
@example(key="sparsity_budget", value=HUGE)
@example(key="sparsity_budget", value=-HUGE)
@example(key="sparsity_budget", value=math.nan)
@example(key="ranking", value=["low_rank"])
@example(key="ranking", value={})
@example(key="min_context", value=-(10**5000))
@example(key="stop_threshold", value="x" * 10_000)
def test_a_setting_is_accepted_exactly_when_it_is_valid(key, value):
    if VALID[key](value):
        kept = getattr(S2OConfig(**{key: value}), key)
        assert kept == (tuple(value) if key == "dense_layers" else value)
        return
    with pytest.raises(ConfigError) as refused:
        resolve({}, {key: value})
    sentence(refused.value, f"{key} is ", ", must be ")


@given(given_settings=st.dictionaries(st.sampled_from([*FIELDS]), values, max_size=4))
def test_settings_together_are_accepted_or_refused_in_a_sentence(given_settings):
    try:
        settled = settle({KEY: given_settings, "other": 1})
    except ConfigError as error:
        said = sentence(error)
        assert any(key in said for key in given_settings)
    else:
        assert settled["other"] == 1
        assert json.loads(json.dumps(settled[KEY])) == settled[KEY]
        assert resolve({}, settled[KEY]).as_dict() == settled[KEY]


names = st.sampled_from([*FIELDS, KEY, FLAGS, "s2o_", "S2O", "other", "s2o-min.context"])


@given(additional=st.dictionaries(names | st.text(max_size=6), values, max_size=3) | values)
@example(additional={FLAGS: 3})
@example(additional={KEY: {"x" * 5000: 1}})
def test_any_additional_config_is_settled_or_refused_in_a_sentence(additional):
    try:
        settled = settle(additional)
    except ConfigError as error:
        sentence(error)
    else:
        assert set(settled) == {*additional, KEY} - {FLAGS}


@given(additional=values, number=st.integers(0, 99))
@example(additional={FLAGS: 3}, number=1)
def test_flags_beside_any_additional_config_are_kept_or_refused(additional, number):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--additional-config", type=json.loads, default={})
    add_flags(parser)
    words = [f"--additional-config={json.dumps(additional)}"]
    for before, after in (([], words), (words, [])):
        try:
            namespace = parser.parse_args([*before, "--s2o-min-context", str(number), *after])
        except argparse.ArgumentError as error:
            said = str(error)
            assert "must be a JSON object" in said
        else:
            assert namespace.additional_config[FLAGS]["min_context"] == number


@given(name=st.sampled_from(OF_REQUESTS), value=values)
@example(name="sparsity_budget", value=HUGE)
@example(name="sparsity_budget", value=True)
@example(name="target_error", value="x" * 10_000)
def test_a_requests_setting_is_accepted_exactly_when_it_is_valid(name, value):
    most = SERVER.max_request_budget if name == "sparsity_budget" else 1
    key = PREFIX + name
    if VALID[name](value) and value <= most:
        assert request_settings({key: value, "other": value}, SERVER) == {name: float(value)}
        return
    with pytest.raises(ConfigError) as refused:
        request_settings({key: value}, SERVER)
    sentence(refused.value, f"{key} is ", "must be ")


others = st.text(max_size=8).filter(lambda key: "s2o" not in key.lower()) | st.integers()


@given(extra=st.dictionaries(others, values, max_size=3))
def test_what_others_ask_for_is_not_ours_to_refuse(extra):
    assert request_settings(extra, SERVER) == {}


@given(value=values, asked=st.booleans())
@example(value={"vllm_xargs": {"s2o_sparsity_budget": 0.9}}, asked=False)
def test_any_body_is_read_or_refused_in_a_sentence(value, asked):
    request = {"prompt": value, "vllm_xargs": value} if asked else value
    try:
        settings = settings_in(json.dumps(request).encode(), SERVER)
    except ConfigError as error:
        sentence(error)
    else:
        assert settings.keys() <= set(OF_REQUESTS)


def escaped(text, draw):
    """Spell a JSON string with some of its characters as escapes."""
    return '"' + "".join(f"\\u{ord(c):04x}" if draw(st.booleans()) else c for c in text) + '"'


@given(
    data=st.data(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]),
    value=st.floats(0.51, 1) | st.just(True),
)
def test_no_spelling_of_a_body_hides_a_budget(data, encoding, value):
    """Python's JSON, which vLLM reads bodies with, knows escapes and other encodings."""
    key, budget = (escaped(word, data.draw) for word in ("vllm_xargs", "s2o_sparsity_budget"))
    body = f"{{{key}: {{{budget}: {json.dumps(value)}}}}}".encode(encoding)
    with pytest.raises(ConfigError, match="s2o_sparsity_budget is "):
        settings_in(body, SERVER)


@given(
    name=st.sampled_from(OF_REQUESTS),
    prefix=st.sampled_from(["", "s2o_", "S2O-", "s2o.", "S2o_"]),
    between=st.sampled_from("_-."),
    upper=st.booleans(),
    place=st.sampled_from(["", "vllm_xargs", "extra_body"]),
)
def test_a_setting_in_another_spelling_or_place_is_refused(name, prefix, between, upper, place):
    key = prefix + name.replace("_", between)
    key = key.upper() if upper else key
    if place == "vllm_xargs" and key == PREFIX + name:
        return
    body = json.dumps({"prompt": "x"} | ({place: {key: 0.1}} if place else {key: 0.1})).encode()
    with pytest.raises(ConfigError) as refused:
        settings_in(body, SERVER)
    sentence(refused.value, place if place == "extra_body" else key, "must be ")
