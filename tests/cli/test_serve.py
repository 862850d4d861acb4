import sys
from pathlib import Path

import pytest

from s2o_vllm.cli import embedded, serve

FOLDER = Path("/cache/model")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("S2O_SPARSITY_BUDGET", "S2O_MIN_CONTEXT", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch):
    """Run main() where a server could start; return (command, variables) it would become."""
    monkeypatch.setattr(serve, "refusal", lambda: None)
    monkeypatch.setattr(serve.environment, "is_cpu_build", lambda: True)
    monkeypatch.setattr(serve.environment, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(serve.embedded, "ensure", lambda say: FOLDER)

    def run(*words):
        calls = []
        code = serve.main(list(words), lambda *call: calls.append(call))
        assert code == 0
        ((program, command, variables),) = calls
        assert program == sys.executable
        assert command[:5] == [sys.executable, "-P", "-m", "s2o_vllm.cli.vllm_command", "serve"]
        return command[5:], variables

    return run


def test_a_named_model_gets_the_backend_and_nothing_else(started):
    words = ["org/model", "--max-model-len", "131072", "--s2o-sparsity-budget", "0.1", "-tp", "2"]
    command, variables = started(*words)
    assert command == [*words, "--attention-backend", "s2o"]
    assert not set(variables) & {"S2O_SPARSITY_BUDGET", "S2O_MIN_CONTEXT", "VLLM_CPU_KVCACHE_SPACE"}


@pytest.mark.parametrize(
    "words",
    [
        ["--attention-backend", "FLASH_ATTN"],
        ["--attention-backend=FLASH_ATTN"],
        ["--attention_backend", "TRITON_ATTN"],
        ["--attention-config.backend", "FLASH_ATTN"],
        ["--attention_config.backend=FLASH_ATTN"],
        ["-ac.backend", "s2o"],
        ["-ac", '{"backend": "FLASH_ATTN"}'],
        ['--attention-config={"flash_attn_version": 2, "backend": "FLASH_ATTN"}'],
    ],
)
def test_another_backend_is_left_alone(started, words):
    command, _ = started("org/model", *words)
    assert command == ["org/model", *words]


@pytest.mark.parametrize(
    "words",
    [
        ["-ac", '{"flash_attn_version": 2}'],
        ["-ac", '{"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}'],
        ["--attention-config.flash_attn_version", "2"],
        ["--served-model-name", "backend"],
    ],
)
def test_other_attention_settings_do_not_switch_s2o_off(started, words):
    command, _ = started("org/model", *words)
    assert command == ["org/model", *words, "--attention-backend", "s2o"]


def test_the_embedded_model_comes_with_defaults(started):
    command, variables = started("--port", "8001")
    assert command == [
        str(FOLDER), "--port", "8001",
        "--served-model-name", "smollm2-135m-instruct", "--max-model-len", "8192",
        "--enforce-eager", "--attention-backend", "s2o",
    ]  # fmt: skip
    assert variables["S2O_SPARSITY_BUDGET"] == "0.25"
    assert variables["S2O_MIN_CONTEXT"] == "512"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_what_the_user_gives_replaces_each_default(started, monkeypatch):
    monkeypatch.setenv("S2O_SPARSITY_BUDGET", "0.5")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    words = ["--max_model_len=4096", "--served-model-name", "mine", "--no-enforce-eager"]
    command, variables = started(*words, "--attention-backend=CPU_ATTN")
    assert command == [str(FOLDER), *words, "--attention-backend=CPU_ATTN"]
    assert variables["S2O_SPARSITY_BUDGET"] == "0.5"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert variables["S2O_MIN_CONTEXT"] == "512"


def test_a_cpu_without_bf16_serves_the_embedded_model_in_fp32(started, monkeypatch):
    monkeypatch.setattr(serve.environment, "cpu_has_bf16", lambda: False)
    command, _ = started()
    assert command[command.index("--dtype") + 1] == "float32"
    command, _ = started("--dtype", "bfloat16")
    assert command.count("--dtype") == 1
    assert "--dtype" not in started("org/model")[0], "a model that the user names is left alone"


@pytest.mark.parametrize("flag", ["-O2", "-cc.mode=none", "--compilation_config.mode=none"])
def test_asking_for_compilation_keeps_it(started, flag):
    assert "--enforce-eager" not in started(flag)[0]


def test_on_a_gpu_the_embedded_model_is_compiled(started, monkeypatch):
    monkeypatch.setattr(serve.environment, "is_cpu_build", lambda: False)
    command, variables = started()
    assert "--enforce-eager" not in command
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables


@pytest.mark.parametrize("flag", [["--model", "org/model"], ["--model=org/model"]])
def test_a_model_may_be_named_by_flag(started, flag):
    command, _ = started("--port", "1", *flag)
    assert command == ["--port", "1", *flag, "--attention-backend", "s2o"]


def test_a_config_file_may_name_model_and_backend(started, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: org/model\nport: 1\n")
    assert started("--config", str(file))[0] == [
        "--config", str(file), "--attention-backend", "s2o",
    ]  # fmt: skip
    file.write_text("model: org/model\nattention-backend: FLASH_ATTN\n")
    assert started(f"--config={file}")[0] == [f"--config={file}"]
    file.write_text("port: 1\n")
    assert started("--config", str(file))[0][0] == str(FOLDER)


def test_help_fetches_no_model(started, monkeypatch, capsys):
    monkeypatch.setattr(serve.embedded, "ensure", lambda say: pytest.fail("fetched a model"))
    assert started("--help")[0] == ["--help"]
    assert "usage: s2o serve [MODEL]" in capsys.readouterr().out


def never(*call):
    pytest.fail("started a server")


def test_a_refusal_is_one_sentence_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(serve.compat, "vllm_version", lambda: None)
    assert serve.main(["org/model"], never) == 2
    assert "found no vLLM: install vllm 0.32" in capsys.readouterr().err


def test_an_unrepaired_cpu_build_is_refused_with_the_repair(monkeypatch, capsys):
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(serve.environment, "installed", versions.get)
    assert serve.main([], never) == 2
    error = capsys.readouterr().err
    assert "torchvision are CUDA builds" in error
    assert "'vllm'" in error
    assert "run 'python -m s2o_vllm.cli.environment' once" in error


def test_bad_environment_settings_are_refused_before_a_download(monkeypatch, capsys):
    monkeypatch.setattr(serve.embedded, "ensure", lambda say: pytest.fail("fetched a model"))
    monkeypatch.setenv("S2O_SPARSITY_BUDGET", "lots")
    assert serve.main([], never) == 2
    error = capsys.readouterr().err
    assert "sparsity_budget is 'lots', must be a number greater than 0 and at most 1" in error


def test_a_model_that_cannot_be_had_is_one_sentence(started, monkeypatch, capsys):
    def ensure(say):
        raise embedded.ModelError("no network; name a model instead.")

    monkeypatch.setattr(serve.embedded, "ensure", ensure)
    assert serve.main([], never) == 2
    assert capsys.readouterr().err == "s2o serve: no network; name a model instead.\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "8001", "org/model"],
        ["--port=8001", "org/model"],
        ["--port", "8001", "gpt2", "--max-model-len", "4096"],
        ["--enforce-eager", "org/model", "--port", "1"],
        ["--no-enable-prefix-caching", "org/model"],
        ["-O3", "org/model"],
        ["--s2o-dense-layers=-1,0", "org/model"],
        ["--served-model-name", "a", "b", "--port", "1", "org/model"],
        ["--sparsity", "-1", "org/model"],
    ],
)
def test_a_model_behind_flags_is_put_first(started, words):
    command, _ = started(*words)
    (model,) = (word for word in words if word in ("org/model", "gpt2"))
    rest = [word for word in words if word != model]
    assert command == [model, *rest, "--attention-backend", "s2o"]


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "8001"],
        ["--host", "0.0.0.0", "--enforce-eager"],
        ["--served-model-name", "org/a", "org/b"],
        ["--tokenizer", "org/tokenizer"],
    ],
)
def test_values_of_flags_are_no_model(started, words):
    assert started(*words)[0][:1] == [str(FOLDER)]


def test_vllms_flags_take_as_many_words_as_we_think():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from s2o_vllm import plugin

    plugin.register()
    actions = make_arg_parser(FlexibleArgumentParser())._actions
    lists = {name for one in actions if one.nargs in ("+", "*") for name in one.option_strings}
    assert lists == serve.LISTS
    valued = {name for one in actions if one.nargs != 0 for name in one.option_strings}
    assert not [name for name in valued if serve.SWITCH.match(name)]


def test_a_plug_in_that_vllm_may_not_load_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(serve.compat, "unsupported_version", lambda: None)
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert serve.main(["org/model"], never) == 2
    error = capsys.readouterr().err
    assert "VLLM_PLUGINS is 'lora', which keeps vLLM from loading the plug-in: add 's2o'" in error
