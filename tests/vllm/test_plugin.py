import os
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from s2o_vllm import compat, plugin, request_hooks
from s2o_vllm.config import ConfigError, S2OConfig


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter outside the repository."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd="/", check=False, **kwargs,
    )  # fmt: skip


def test_kernels_install_inside_our_package_only():
    result = run_python("""
        import importlib.util, s2o_vllm.kernels.work_list
        assert importlib.util.find_spec("kernels") is None, "a top-level `kernels` is importable"
        print(s2o_vllm.kernels.work_list.__name__)
    """)
    assert result.stdout.strip() == "s2o_vllm.kernels.work_list", result.stderr


def test_importing_the_package_is_inert():
    result = run_python("""
        import sys, s2o_vllm, s2o_vllm.config, s2o_vllm.plugin
        print([name for name in ("torch", "triton", "vllm") if name in sys.modules])
    """)
    assert result.stdout.strip() == "[]", result.stderr


def test_kernels_never_import_vllm():
    result = run_python("""
        import sys
        import pkgutil, s2o_vllm.kernels
        paths = s2o_vllm.kernels.__path__, "s2o_vllm.kernels."
        names = [module.name for module in pkgutil.walk_packages(*paths)]
        assert len(names) > 20
        for name in names:
            __import__(name)
        print([name for name in sys.modules if name.split(".")[0] == "vllm"])
    """)
    assert result.stdout.strip() == "[]", result.stderr


def test_registering_loads_no_triton_kernel_and_no_backend():
    result = run_python("""
        import sys
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        print([name for name in sys.modules if name.startswith(("s2o_vllm.kernels", "s2o_vllm.b"))])
        from vllm.v1.attention.backends.registry import AttentionBackendEnum as E
        print(E["S2O"] is E.CUSTOM, E.CUSTOM.get_path())
    """)
    lines = result.stdout.strip().splitlines()[-2:]
    assert lines == ["[]", f"True {compat.CUDA_BACKEND}"], result.stderr


@pytest.mark.parametrize("spelling", ["s2o", "S2O", "CUSTOM"])
def test_flag_spellings(spelling, tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs

    for flag in ("--attention-backend", "-ac.backend"):
        args = parse(["--model", tiny_model, flag, spelling])
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        assert vllm_config.attention_config.backend.name == "CUSTOM"
        assert compat.settings_of(vllm_config) is not None


def test_registering_twice_changes_nothing_more():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    before = EngineArgs.__dict__["create_engine_config"]
    plugin.register()
    assert EngineArgs.__dict__["create_engine_config"] is before


def test_alias_unpickles_where_the_plug_in_is_not_loaded_yet():
    """Workers are spawned, and unpickle the configuration before they load plug-ins."""
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    data = pickle.dumps(AttentionBackendEnum["S2O"])
    result = run_python(f"import pickle; print(pickle.loads({data!r}).name)")
    assert result.stdout.strip().splitlines()[-1:] == ["CUSTOM"], result.stderr


def parse(arguments):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments)


@pytest.mark.parametrize("order", [0, 1])
def test_flags_survive_additional_config_on_either_side(order, tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs

    flag = ["--s2o-sparsity-budget", "0.3"]
    additional = ["--additional-config", '{"s2o": {"min_context": 7}, "other": 1}']
    arguments = [*flag, *additional] if order else [*additional, *flag]
    args = parse(["--model", tiny_model, "--attention-backend", "s2o", *arguments])
    settings = AsyncEngineArgs.from_cli_args(args).create_engine_config().additional_config
    assert settings["other"] == 1
    assert settings["s2o"]["sparsity_budget"] == 0.3
    assert settings["s2o"]["min_context"] == 7


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--s2o-sparsity-budget", "0"),
        ("--s2o-sparsity-budget", "1.5"),
        ("--s2o-sparsity-budget", "lots"),
        ("--s2o-sparsity-budget", "nan"),
        ("--s2o-stop-threshold", "-1"),
        ("--s2o-min-context", "many"),
        ("--s2o-dense-layers", "first"),
        ("--s2o-max-request-budget", "2"),
    ],
)
def test_bad_flags_are_refused_by_the_parser(flag, value, capsys):
    with pytest.raises(SystemExit):
        parse([flag, value])
    error = capsys.readouterr().err
    assert flag in error
    assert "must be" in error


@pytest.mark.parametrize("flag", [["--s2o-dense-layers", "0,-1"], ["--s2o-dense-layers=-1,0"]])
def test_dense_layers_as_a_flag(flag, tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = parse(["--model", tiny_model, "--attention-backend", "s2o", *flag])
    vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert compat.settings_of(vllm_config).dense_layers == (0, 1)


def test_flags_without_the_backend_are_refused(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = parse(["--model", tiny_model, "--s2o-sparsity-budget", "0.3"])
    with pytest.raises(ValueError, match="--s2o-sparsity-budget needs --attention-backend s2o"):
        AsyncEngineArgs.from_cli_args(args).create_engine_config()


def test_settings_are_refused_before_the_model_is_looked_at(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    args = EngineArgs(
        model=str(tmp_path), attention_backend="s2o", additional_config={"s2o": {"budget": 0.1}}
    )
    with pytest.raises(ValueError, match="unknown setting 'budget'"):
        args.create_engine_config()


def test_stock_configuration_is_untouched(tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    assert EngineArgs(model=tiny_model).create_engine_config().additional_config == {}


@pytest.fixture
def processed():
    """Send a request's parameters through the hook of a server with a cap of 0.25."""
    settings = S2OConfig(max_request_budget=0.25).as_dict()
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"s2o": settings}))

    def process(extra_args):
        request = SimpleNamespace(cache_salt=None)
        params = SimpleNamespace(extra_args=extra_args)
        return request_hooks._process_inputs(lambda *_: request, processor, "id", "prompt", params)

    return process


def test_a_request_above_the_cap_is_the_clients_error(processed):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"must be at most 0\.25 on this server"):
        processed({"s2o_sparsity_budget": 0.5})


def test_a_request_within_the_cap_is_salted_with_its_budget(processed):
    assert "sparsity_budget=0.2," in processed({"s2o_sparsity_budget": 0.2}).cache_salt
    assert "sparsity_budget=0.1," in processed(None).cache_salt


@pytest.mark.parametrize("found", ["0.25.1", "0.31.0", "0.34.0", "1.0", "dev"])
def test_other_releases_are_named_in_one_sentence(found):
    reason = compat.unsupported_version(found)
    assert found in reason
    assert "0.32 to 0.33" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_supported_releases(found):
    assert compat.unsupported_version(found) is None


@pytest.mark.parametrize(
    "words",
    [
        "/bin/vllm serve m --attention-backend s2o",
        "/bin/vllm serve m --attention_backend=S2O",
        "/site-packages/vllm/entrypoints/cli/main.py serve m -ac.backend s2o",
        "vllm serve m --s2o_sparsity_budget 0.1",
    ],
)
def test_asking_an_unsupported_vllm_for_s2o_ends_the_command(words, monkeypatch, capsys):
    monkeypatch.setattr(compat, "vllm_version", lambda: "9.9")
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as end:
        plugin.register()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "supports vLLM 0.32 to 0.33 and found 9.9" in lines[0]


@pytest.mark.parametrize(
    "words",
    [
        "/bin/vllm serve m",
        "/bin/vllm serve m --attention-backend CUSTOM",
        "/bin/vllm serve s2o --served-model-name s2o",
        "/bin/mine.py --attention-backend s2o",
        "",
    ],
)
def test_other_commands_are_no_question_for_s2o(words):
    assert not plugin.named_on_command_line(words.split())


PROGRAMS = {
    "/bin/vllm serve m": "vllm serve",
    "vllm bench latency": "vllm bench",
    "vllm": "vllm",
    "/site-packages/vllm/entrypoints/cli/main.py run-batch": "vllm run-batch",
    "/site-packages/vllm/entrypoints/openai/api_server.py --port 1": (
        "python -m vllm.entrypoints.openai.api_server"
    ),
    "/home/me/serve.py": None,
    "-c": None,
    "": None,
}


@pytest.mark.parametrize("words", PROGRAMS)
def test_vllms_commands_are_told_from_other_programs(words):
    assert plugin.vllm_command(words.split()) == PROGRAMS[words]


def refused(model):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    engine_args = EngineArgs(
        model=model, attention_backend="s2o", additional_config={"s2o": {"budget": 1}}
    )
    engine_args.create_engine_config()


def test_a_refusal_ends_a_command_with_one_sentence(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/vllm", "serve"])
    with pytest.raises(SystemExit) as end:
        refused(tiny_model)
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("vllm serve: error: s2o: unknown setting 'budget', must be one of ")


def test_a_refusal_in_a_child_of_a_command_is_an_error_that_its_parent_hears(
    tiny_model, monkeypatch
):
    """`vllm bench startup` waits for what its child says."""
    monkeypatch.setattr(sys, "argv", ["/bin/vllm", "bench", "startup"])
    monkeypatch.setattr(compat.multiprocessing, "parent_process", lambda: object())
    with pytest.raises(ConfigError, match="unknown setting 'budget'"):
        refused(tiny_model)


def test_a_refusal_in_python_is_a_value_error(tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/serve.py"])
    with pytest.raises(ConfigError, match="unknown setting 'budget'"):
        refused(tiny_model)


OFFLINE = """
from vllm import EngineArgs, LLM
from vllm.config import AttentionConfig
from vllm.utils.argparse_utils import FlexibleArgumentParser
print(AttentionConfig(backend="s2o").backend.name)
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
words = ["--model", {model!r}, "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.2"]
args = vars(parser.parse_args(words))
print(EngineArgs(**args).create_engine_config().additional_config["s2o"]["sparsity_budget"])
"""


def test_name_and_flags_are_known_before_vllm_loads_plug_ins(tiny_model):
    """LLM(attention_config={...}) and scripts with parsers of their own come before that."""
    result = run_python(OFFLINE.format(model=tiny_model))
    lines = result.stdout.splitlines()
    assert "CUSTOM" in lines, result.stderr
    assert lines[-1] == "0.2", result.stderr


def test_plug_ins_that_are_not_allowed_stay_out():
    code = "from vllm.config import AttentionConfig; AttentionConfig(backend='s2o')"
    result = run_python(code, env=os.environ | {"VLLM_PLUGINS": "lora"})
    assert "Unknown attention backend: 'S2O'" in result.stderr


def test_an_unsupported_vllm_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(compat, "unsupported_version", lambda: "s2o-vllm found 9.9")
    monkeypatch.setattr(compat, "install", lambda: pytest.fail("installed"))
    plugin.register()
    assert "9.9" in caplog.text
