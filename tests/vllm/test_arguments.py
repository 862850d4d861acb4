"""vLLM's own argument objects carry the flags, whatever is done with them on the way."""

import argparse
import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from s2o_vllm import compat, plugin

GIVEN = ["--attention-backend", "s2o", "--s2o-sparsity-budget", "0.3", "--s2o-dense-layers", "0"]


def parser(kind="AsyncEngineArgs"):
    from vllm.engine import arg_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    return getattr(arg_utils, kind).add_cli_args(FlexibleArgumentParser())


def parse(*words):
    return parser().parse_args(list(words))


def from_cli(args):
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(args)


def settings(engine_args):
    found = compat.settings_of(engine_args.create_engine_config())
    return found and (found.sparsity_budget, found.dense_layers)


@pytest.mark.parametrize("given", [[], GIVEN])
def test_nothing_is_added_to_what_vllm_parses(given, tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    args = parser("EngineArgs").parse_args(["--model", tiny_model, *given])
    assert {name for name in vars(args) if name.startswith("s2o")} == set()
    engine_args = EngineArgs.from_cli_args(args)
    assert set(vars(engine_args)) == known
    assert set(vars(EngineArgs(**vars(engine_args)))) == known, "as LLM.from_engine_args does"


COPIES = {
    "vars": lambda args: type(args)(**vars(args)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "replace": dataclasses.replace,
    "pickle": lambda args: pickle.loads(pickle.dumps(args)),
}


@pytest.mark.parametrize("way", COPIES)
def test_settings_survive_copies_of_engine_arguments(way, tiny_model):
    engine_args = from_cli(parse("--model", tiny_model, *GIVEN))
    assert settings(COPIES[way](engine_args)) == (0.3, (0,))
    assert settings(COPIES[way](engine_args)) == (0.3, (0,)), "a second configuration"


def test_settings_survive_copies_of_parsed_arguments(tiny_model):
    args = parse("--model", tiny_model, *GIVEN)
    for other in (
        copy.copy(args),
        pickle.loads(pickle.dumps(args)),
        argparse.Namespace(**json.loads(json.dumps(vars(args), default=str))),
    ):
        assert other.additional_config == args.additional_config
    assert settings(from_cli(pickle.loads(pickle.dumps(args)))) == (0.3, (0,))


def test_the_configuration_is_plain_data(tiny_model):
    vllm_config = from_cli(parse("--model", tiny_model, *GIVEN)).create_engine_config()
    assert set(vllm_config.additional_config) == {"s2o"}
    json.dumps(vllm_config.additional_config)
    assert compat.settings_of(pickle.loads(pickle.dumps(vllm_config))).sparsity_budget == 0.3
    assert dataclasses.asdict(from_cli(parse("--model", tiny_model)))["additional_config"] == {}


def test_engine_arguments_stay_as_they_were_given(tiny_model):
    engine_args = from_cli(parse("--model", tiny_model, *GIVEN))
    before = copy.deepcopy(engine_args.additional_config)
    engine_args.create_engine_config()
    assert engine_args.additional_config == before


def test_parsing_leaves_the_parser_as_it_was(tiny_model):
    ours = parser()
    ours.parse_args(["--model", tiny_model, *GIVEN])
    assert ours.parse_args(["--model", tiny_model]).additional_config == {}


CHILD = """
import pickle, sys
args = pickle.loads(bytes.fromhex(sys.argv[1]))
from vllm.engine.arg_utils import AsyncEngineArgs
engine_args = AsyncEngineArgs.from_cli_args(args)  # before the plug-in is loaded
found = engine_args.create_engine_config().additional_config["s2o"]
print(found["sparsity_budget"], found["max_request_budget"])
"""


def test_a_spawned_process_that_loads_the_plug_in_later_sees_the_flags(tiny_model):
    """As API servers beyond the first do, and those of data parallel ranks."""
    args = parse("--model", tiny_model, *GIVEN, "--s2o-max-request-budget", "0.6")
    command = [sys.executable, "-c", CHILD, pickle.dumps(args).hex()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.split()[-2:] == ["0.3", "0.6"], done.stderr


@pytest.mark.parametrize(
    "additional",
    [
        ["--additional-config", '{"s2o": {"sparsity_budget": 0.9, "min_context": 7}, "other": 1}'],
        ["--additional-config.s2o.sparsity_budget", "0.9",
         "--additional-config.s2o.min_context", "7", "--additional-config.other", "1"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_a_flag_wins_over_additional_config_on_either_side(additional, first, tiny_model):
    words = [*GIVEN, *additional] if first else [*additional, *GIVEN]
    found = from_cli(parse("--model", tiny_model, *words)).create_engine_config().additional_config
    assert found["other"] == 1
    assert (found["s2o"]["sparsity_budget"], found["s2o"]["min_context"]) == (0.3, 7)


def test_the_last_of_two_flags_wins(tiny_model):
    args = parse("--model", tiny_model, *GIVEN, "--s2o-sparsity-budget", "0.2")
    assert settings(from_cli(args)) == (0.2, (0,))


@pytest.mark.parametrize(
    ("additional", "said"),
    [
        ({"s2o_sparsity_budget": 0.5}, "'s2o_sparsity_budget', must be 'sparsity_budget' in 's2o'"),
        ({"s2o-sparsity-budget": 0.5}, "'s2o-sparsity-budget', must be 'sparsity_budget' in 's2o'"),
        ({"sparsity_budget": 0.5}, "'sparsity_budget', must be 'sparsity_budget' in 's2o'"),
        ({"S2O": {"sparsity_budget": 0.5}}, "'S2O', must be 's2o'"),
        ({"s2o": {"s2o_sparsity_budget": 0.5}}, "unknown setting 's2o_sparsity_budget'"),
        ("s2o", "additional_config is 's2o', must be a JSON object"),
    ],
)
def test_a_misplaced_setting_is_refused_with_its_place(additional, said, tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    engine_args = EngineArgs(
        model=tiny_model, attention_backend="s2o", additional_config=additional
    )
    with pytest.raises(ValueError, match=f"s2o: .*{said}"):
        engine_args.create_engine_config()


def test_what_others_keep_in_additional_config_is_left_alone(tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    others = {"ranking": "theirs", "sparsity_budget": 3}
    made = EngineArgs(model=tiny_model, additional_config=others).create_engine_config()
    assert made.additional_config == others


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["s2o-dense-where-faster: true"], {"dense_where_faster": True}),
        (["s2o-dense-where-faster: false"], {"dense_where_faster": False}),
        (["s2o_dense_layers: [0, 1]"], {"dense_layers": [0, 1]}),
        (["s2o-dense-layers: [0, -1]"], {"dense_layers": [0, 1]}),
        (["s2o-dense-layers: 1"], {"dense_layers": [1]}),
        (['s2o-dense-layers: "0,-1"'], {"dense_layers": [0, 1]}),
        (["s2o-sparsity-budget: 0.2", "s2o-min-context: 5"],
         {"sparsity_budget": 0.2, "min_context": 5}),
        (["additional-config: {s2o: {dense_layers: [1], dense_where_faster: false}}"],
         {"dense_layers": [1], "dense_where_faster": False}),
    ],
)  # fmt: skip
def test_a_yaml_file_says_what_it_says(lines, found, tiny_model, tmp_path):
    """As vLLM makes flags of it."""
    file = tmp_path / "serve.yaml"
    file.write_text("\n".join([f"model: {tiny_model}", "attention-backend: s2o", *lines]))
    args = parse("--config", str(file))
    assert args.model == tiny_model
    own = from_cli(args).create_engine_config().additional_config["s2o"]
    assert {key: own[key] for key in found} == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("s2o-target-error: false", "target_error is False, must be a number from 0"),
        ("s2o-min-context: true", "expected one argument"),
        ("s2o-dense-layers: [first]", "dense_layers is 'first', must be a list of layer numbers"),
        ("s2o-dense-where-faster: maybe", "dense_where_faster is 'maybe', must be true or false"),
        ("s2o-permute-queries: true", "permute_queries was removed"),
        ("s2o-permute-queries: false", "permute_queries was removed"),
    ],
)
def test_what_a_yaml_file_may_not_say_is_refused(line, said, tiny_model, tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {tiny_model}\n{line}\n")
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--config", str(file)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("word", [[], ["true"], ["1"]])
def test_a_flag_that_is_true_needs_no_word(word):
    assert parse("--s2o-dense-where-faster", *word).additional_config == {
        "s2o_flags": {"dense_where_faster": True}
    }


@pytest.mark.parametrize(
    "words", [["--s2o-permute-queries"], ["--s2o-permute-queries", "true"],
              ["--no-s2o-permute-queries"]],
)  # fmt: skip
def test_a_setting_that_was_removed_is_refused_in_one_sentence(words, tiny_model, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--model", tiny_model, *words])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(
        "s2o: permute_queries was removed (no measurement showed a use for it): leave it out"
    )
