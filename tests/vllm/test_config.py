import dataclasses
import json
import math

import pytest

from s2o_vllm import config
from s2o_vllm.config import ConfigError, S2OConfig, resolve


@pytest.mark.parametrize(
    "value", [0, 0.0, 1.5, -0.1, math.nan, math.inf, "lots", "0.1", True, None]
)
def test_budget_out_of_range_or_of_wrong_type_is_refused(value):
    with pytest.raises(ConfigError) as refusal:
        S2OConfig(sparsity_budget=value)
    message = str(refusal.value)
    assert "sparsity_budget" in message
    assert repr(value) in message
    assert "greater than 0 and at most 1" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("stop_threshold", -0.1, "from 0"),
        ("stop_threshold", math.nan, "from 0"),
        ("stop_threshold", "no", "from 0"),
        ("min_context", -1, "0 or more"),
        ("min_context", 1.5, "whole number"),
        ("min_budget_tokens", -1, "0 or more"),
        ("min_budget_tokens", 0.5, "whole number"),
        ("segment_size", 8, "16 to 4096"),
        ("segment_size", 5000, "16 to 4096"),
        ("ranking", "best", "one of low_rank, mean_query"),
        ("ranking", 3, "one of low_rank, mean_query"),
        ("dense_where_faster", 1, "true or false"),
        ("self_test", 1, "true or false"),
        ("status_page", "yes", "true or false"),
        ("max_request_budget", 1.5, "from 0"),
        ("max_request_budget", -0.1, "from 0"),
        ("max_request_budget", True, "from 0"),
        ("dense_layers", "0,1", "a list of layer numbers"),
        ("dense_layers", 3, "a list of layer numbers"),
        ("dense_layers", [0, 1.5], "a list of layer numbers"),
        ("dense_layers", [True], "a list of layer numbers"),
        ("decode_budget", 0, "greater than 0"),
        ("decode_min_context", -1, "0 or more"),
        ("decode_requests", 0, "from 1 to 256"),
        ("decode_requests", 2.5, "whole number"),
        ("shadow_rate", 1.5, "from 0"),
        ("shadow_rate", True, "from 0"),
        ("shadow_limit", -0.1, "from 0"),
        ("shadow_limit", math.inf, "to 10"),
    ],
)
def test_other_settings_are_refused_by_name(key, value, allowed):
    with pytest.raises(ConfigError, match=f"{key} is .*{allowed}"):
        S2OConfig(**{key: value})


def test_whole_numbers_are_floats_where_a_setting_is_one():
    """JSON has no point in 0; a kernel that is given an integer is another one."""
    settings = {"sparsity_budget": 1, "target_error": 0, "stop_threshold": 0, "decode_budget": 1}
    made = resolve({}, settings, {})
    assert {type(getattr(made, key)) for key in settings} == {float}
    assert made == resolve({}, {key: float(value) for key, value in settings.items()}, {})


@pytest.mark.parametrize("ranking", config.RANKINGS)
def test_decode_is_sparse_whatever_ranks_the_prompt(ranking):
    assert not S2OConfig(ranking=ranking).decodes
    assert S2OConfig(ranking=ranking, decode_budget=0.1).decodes


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        S2OConfig().sparsity_budget = 1.0


def test_precedence_flag_over_additional_config_over_environment_over_default():
    environment = {"S2O_SPARSITY_BUDGET": "0.5", "S2O_MIN_CONTEXT": "100", "S2O_SEGMENT_SIZE": "64"}
    additional = {"sparsity_budget": 0.4, "min_context": 200}
    settings = resolve({"sparsity_budget": 0.3}, additional, environment)
    assert settings.sparsity_budget == 0.3
    assert settings.min_context == 200
    assert settings.segment_size == 64
    assert settings.stop_threshold == S2OConfig().stop_threshold


def test_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown setting 'budget', must be one of sparsity_bud"):
        resolve({}, {"budget": 0.1}, {})


@pytest.mark.parametrize("settings", [[0.1], "0.1", 3])
def test_settings_that_are_no_object_are_refused(settings):
    with pytest.raises(ConfigError, match="must be a JSON object"):
        resolve({}, settings, {})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("S2O_SPARSITY_BUDGET", "lots"),
        ("S2O_MIN_CONTEXT", "1.5"),
        ("S2O_DENSE_WHERE_FASTER", "maybe"),
        ("S2O_PERMUTE_QUERIES", "true"),
    ],  # removed
)
def test_bad_environment_is_refused_by_key(variable, text):
    with pytest.raises(ConfigError, match=variable.removeprefix("S2O_").lower()):
        resolve({}, None, {variable: text})


def test_environment_booleans():
    assert resolve({}, None, {"S2O_DENSE_WHERE_FASTER": "false"}).dense_where_faster is False


@pytest.mark.parametrize(
    "settle",
    [
        lambda: resolve({}, {"permute_queries": True}),
        lambda: resolve({}, None, {"S2O_PERMUTE_QUERIES": "false"}),
        lambda: config.settle({"s2o-permute-queries": True}),
    ],
)
def test_a_setting_that_was_removed_is_refused_wherever_it_stands(settle):
    with pytest.raises(ConfigError, match=r"s2o: permute_queries was removed \(no measure"):
        settle()


def test_each_ranking_has_its_segment_size_and_a_kernel():
    from s2o_vllm.kernels import ranking

    assert tuple(config.RANKINGS) == ranking.RANKINGS
    assert S2OConfig().ranking == "low_rank"
    assert [S2OConfig(ranking=name).segment for name in config.RANKINGS] == [64, 512]
    assert S2OConfig(ranking="mean_query").segment == 512
    assert S2OConfig(ranking="mean_query", segment_size=128).segment == 128


def test_dictionary_round_trip():
    settings = S2OConfig(sparsity_budget=0.2, min_context=10, dense_layers=(0, -1))
    assert S2OConfig(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("text", "layers"), [("0,1,-1", (0, 1, -1)), (" 3 ", (3,)), ("-1, 0", (-1, 0)), ("", ())]
)
def test_layers_are_read_from_text(text, layers):
    assert resolve({}, None, {"S2O_DENSE_LAYERS": text}).dense_layers == layers


@pytest.mark.parametrize("text", ["first", "0,,1", "0 1", "1.5"])
def test_layers_that_are_no_numbers_are_refused(text):
    with pytest.raises(ConfigError, match=f"dense_layers is '{text}', must be a list of layer"):
        config.parse_text("dense_layers", text)


def test_layers_are_counted_from_the_first_of_the_model():
    settings = S2OConfig(min_context=7, dense_layers=(-1, 0, 3, 1, -4))
    assert settings.for_layers(4) == S2OConfig(min_context=7, dense_layers=(0, 1, 3))


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_the_model_lacks_is_refused_with_the_range(layer):
    with pytest.raises(ConfigError, match=f"dense_layers has {layer}, must be from -4 to 3 "):
        S2OConfig(dense_layers=(0, layer)).for_layers(4)


def test_a_target_error_needs_scores_that_are_probabilities():
    with pytest.raises(ConfigError, match=r"target_error is 0.1, must be 0 with ranking mean_que"):
        S2OConfig(target_error=0.1, ranking="mean_query")
    assert S2OConfig(target_error=0.1, ranking="low_rank").target_error == 0.1


def test_a_cap_below_the_servers_own_budget_is_refused():
    with pytest.raises(
        ConfigError, match=r"max_request_budget is 0.2, must be 0 or at least .*, which is 0.3"
    ):
        resolve({"max_request_budget": 0.2}, {"sparsity_budget": 0.3}, {})
    for cap in (0, 0.3, 1):
        assert resolve({"max_request_budget": cap}, {"sparsity_budget": 0.3}, {})


def test_every_setting_has_a_help_text():
    assert list(config.HELP) == list(config.FIELDS)
    assert all(name in config.HELP["ranking"] for name in config.RANKINGS)
    assert f"Default: {S2OConfig().ranking}." in config.HELP["ranking"]
    assert f"Default: {S2OConfig().segment} " in config.HELP["segment_size"]
