"""``s2o serve``: stock ``vllm serve`` with S2O on, and a model of its own when none is named."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .. import compat, config
from . import embedded, environment

USAGE = """usage: s2o serve [MODEL] [any flag of vllm serve]

With a MODEL (first, or behind flags; or --model, or a --config file that names one):
  vllm serve MODEL --attention-backend s2o, with every flag passed through.
Without one: SmolLM2-135M-Instruct with 8K of context, fetched and converted once.
--attention-backend chooses another backend. What follows is the help of vllm serve.
"""

EMBEDDED_FLAGS = {
    "--served-model-name": embedded.NAME,
    "--max-model-len": str(embedded.CONTEXT),
}
COMPILATION = (
    "--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc",
    "--optimization-level", "-O",
)  # fmt: skip
# Flags of vLLM that take any number of words, and those that take none.
LISTS = frozenset({
    "--allowed-media-domains", "--api-key", "--collect-detailed-traces", "--cpu-offload-params",
    "--cudagraph-capture-sizes", "--ignore-patterns", "--kv-cache-dtype-skip-layers",
    "--logits-processors", "--lora-modules", "--lora-target-modules", "--numa-bind-cpus",
    "--numa-bind-nodes", "--offload-params", "--s2o-dense-layers", "--served-model-name",
    "--sleep-preserve-parameter-names",
})  # fmt: skip
SWITCH = re.compile(r"--(no|enable|enforce|trust|disable(?!-access-log-for))-|-O\d$|-(ep|dp[hem])$")
# Set as environment variables, which every other way to give a setting overrides.
EMBEDDED_SETTINGS = {"S2O_SPARSITY_BUDGET": "0.25", "S2O_MIN_CONTEXT": "512"}
CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB, 22,000 tokens or more of this model


def flag_names(words: Sequence[str]) -> set[str]:
    """Return the flags among the words, as vLLM reads them: ``--a_b=c`` is ``--a-b``."""
    names = (word.split("=", 1)[0].split(".", 1) for word in words if word.startswith("-"))
    return {".".join([first.replace("_", "-"), *rest]) for first, *rest in names}


def _with_next(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(words, [*words, ""][1:], strict=True)


def config_text(words: Sequence[str]) -> str:
    """Return the text of the ``--config`` file, or an empty one if there is none to read."""
    for word, value in _with_next(words):
        if word == "--config" or word.startswith("--config="):
            path = Path(value if word == "--config" else word.split("=", 1)[1])
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return ""  # vLLM says what is wrong with it
    return ""


def model_first(words: Sequence[str]) -> list[str]:
    """Return the words with a model that stands behind flags put first, where vLLM reads it."""
    flag = None  # whose words may follow
    for number, word in enumerate(words):
        if re.match(r"--?[A-Za-z]", word):
            (name,) = flag_names([word])
            flag = None if "=" in word or SWITCH.match(name) else name
        elif flag is None:
            return [word, *words[:number], *words[number + 1 :]]
        elif flag not in LISTS:
            flag = None
    return list(words)


def names_model(words: Sequence[str]) -> bool:
    """Tell whether the user named a model; where it is a word alone, it is the first."""
    if words and not words[0].startswith("-"):
        return True
    in_file = re.search(r"^(model|model[-_]tag)\s*:", config_text(words), re.MULTILINE)
    return "--model" in flag_names(words) or in_file is not None


def chooses_backend(words: Sequence[str]) -> bool:
    """Tell whether the user chose an attention backend in any of vLLM's ways."""
    names = flag_names(words)
    if names & {"--attention-backend", "--attention-config.backend", "-ac.backend"}:
        return True
    for word, value in _with_next(words):
        name, _, joined = word.partition("=")
        attention = name.replace("_", "-") in ("--attention-config", "-ac")
        if attention and re.search(r'"backend"\s*:', joined or value):
            return True
    in_file = re.search(r"^\s*(attention[-_])?backend\s*:", config_text(words), re.MULTILINE)
    return in_file is not None


def arguments(words: Sequence[str], model: Path | None, *, on_cpu: bool) -> list[str]:
    """Return the words after ``vllm serve``.

    Args:
        words: what the user gave; all of it is passed on, and wins over a default.
        model: the embedded model's folder, or None if the user named a model.
        on_cpu: whether this vLLM was built for the CPU.
    """
    given = flag_names(words)
    result = list(words) if model is None else [str(model), *words]
    if model is not None:
        for flag, value in EMBEDDED_FLAGS.items():
            if flag not in given:
                result += [flag, value]
        if on_cpu and not any(name.startswith(COMPILATION) for name in given):
            result.append("--enforce-eager")  # compiling would double the time to start
        if on_cpu and "--dtype" not in given and not environment.cpu_has_bf16():
            result += ["--dtype", "float32"]
    if not chooses_backend(words):
        result += ["--attention-backend", "s2o"]
    return result


def variables(given: Mapping[str, str], *, embedded_model: bool, on_cpu: bool) -> dict[str, str]:
    """Return the environment variables to add to those given."""
    defaults = dict(EMBEDDED_SETTINGS) if embedded_model else {}
    if embedded_model and on_cpu:
        defaults |= CPU_SETTINGS
    return {name: value for name, value in defaults.items() if name not in given}


def refusal() -> str | None:
    """Return what keeps a server from starting here, in a sentence, or None."""
    try:
        config.resolve({}, None)
    except config.ConfigError as error:
        return f"the environment's settings are refused: {error}."
    if reason := compat.unsupported_version() or environment.plugin_problem(os.environ):
        return reason
    if found := environment.problems():
        return " ".join(found)
    if environment.is_cpu_build():
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return (
        "vLLM is built for a GPU and PyTorch finds none: run 's2o doctor', "
        f"or install {environment.CPU_DISTRIBUTION} in an environment of its own."
    )


def say(line: str) -> None:
    """Print one line of progress."""
    print(f"s2o: {line}", flush=True)


def main(
    argv: Sequence[str] | None = None,
    execute: Callable[[str, list[str], Mapping[str, str]], None] = os.execve,
) -> int:
    """Become ``vllm serve``; returns only if it cannot.

    Args:
        argv: the words after ``s2o serve``.
        execute: replaces the process; tests put their own here.
    """
    words = model_first(sys.argv[2:] if argv is None else argv)
    wants_help = bool(flag_names(words) & {"-h", "--help"})
    if reason := refusal():
        if wants_help:
            print(USAGE)
        print(f"s2o serve: {reason}", file=sys.stderr)
        return 2
    on_cpu = environment.is_cpu_build()
    model, added = None, {}
    if wants_help:
        print(USAGE, flush=True)
    else:
        say(f"Device: {'CPU' if on_cpu else 'GPU'}")
        if not names_model(words):
            try:
                model = embedded.ensure(say)
            except embedded.ModelError as error:
                print(f"s2o serve: {error}", file=sys.stderr)
                return 2
        added = variables(os.environ, embedded_model=model is not None, on_cpu=on_cpu)
        words = arguments(words, model, on_cpu=on_cpu)
        shown = [f"{name}={value}" for name, value in added.items()]
        say(f"Starting: {shlex.join([*shown, 'vllm', 'serve', *words])}")
    # -P: the folder this is started in must not become importable.
    command = [sys.executable, "-P", "-m", "s2o_vllm.cli.vllm_command", "serve", *words]
    execute(sys.executable, command, os.environ | added)
    return 0
