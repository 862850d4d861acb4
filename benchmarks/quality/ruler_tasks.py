"""RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654) as files, and how their answers score.

A folder holds, at any depth, ``TASK.jsonl`` (or ``TASK/validation.jsonl``, as RULER's own
generator writes; ``.gz`` and ``.xz`` too), one prompt a line:

=====================  =============================================================
``input``              the prompt up to and with the start of the answer
``outputs``            strings that the answer should hold
``index``              number of the sample (default: of the line)
``seed``               the generator's seed; default: not known
``question``           ``end`` (default) or ``start``: after the text or before it
``task``               default: the file's or its folder's name
``context``            length the task was made for, in tokens; default: the nearest
                       folder whose name is a number, else the longest ``length``
``length``             tokens of the prompt and ``max_new_tokens``
``max_new_tokens``     default: RULER's for the task
``metric``             ``all`` or ``part``, default: RULER's for the task
``add_special_tokens`` the server begins the prompt as the model wants (default); false
                       where the prompt already holds the chat template
=====================  =============================================================
"""

import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .ruler_questions import END, QUESTIONS
from .samples import EvalError

SUFFIXES: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.decompress,
    ".jsonl.xz": lzma.decompress,
}
METRICS = ("all", "part")


class Task(NamedTuple):
    """How a task's answers are taken: longest answer in tokens, and the metric."""

    max_new_tokens: int
    metric: str


TASKS = {
    "niah_single_1": Task(128, "all"),
    "niah_single_2": Task(128, "all"),
    "niah_single_3": Task(128, "all"),
    "niah_multikey_1": Task(128, "all"),
    "niah_multikey_2": Task(128, "all"),
    "niah_multikey_3": Task(128, "all"),
    "niah_multivalue": Task(128, "all"),
    "niah_multiquery": Task(128, "all"),
    "vt": Task(30, "all"),
    "cwe": Task(120, "all"),
    "fwe": Task(50, "all"),
    "qa_1": Task(32, "part"),
    "qa_2": Task(32, "part"),
}


@dataclass(frozen=True)
class Sample:
    """One prompt and what its answer should hold; fields as in the files.

    Attributes:
        digest: of the prompt, to know it again.
    """

    task: str
    context: int
    index: int
    input: str
    outputs: tuple[str, ...]
    max_new_tokens: int
    metric: str
    length: int | None
    add_special_tokens: bool
    question: str = END
    seed: int | None = None

    @property
    def number(self) -> tuple[Any, ...]:
        """Return what names one prompt of a tokenizer and a chat template."""
        return (self.context, self.task, self.question, self.seed, self.index)

    @property
    def digest(self) -> str:
        """Return the first 16 hexadecimal digits of the prompt's SHA-256."""
        return hashlib.sha256(self.input.encode()).hexdigest()[:16]


def score(answer: str, outputs: Sequence[str], metric: str) -> float:
    """Return a share in [0, 1], upper and lower case alike.

    Args:
        answer: what the model wrote.
        outputs: strings to find in it, at least one.
        metric: ``all``: the share of them that is found; ``part``: 1 if any is.
    """
    text = answer.lower()
    found = [output.lower() in text for output in outputs]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def read_tasks(
    folder: Path, tasks: Sequence[str] | None = None, contexts: Sequence[int] | None = None
) -> list[Sample]:
    """Read the samples below a folder, ordered by context, place of the question and task.

    Args:
        folder: of the files.
        tasks: some of the tasks; default: all.
        contexts: some of the lengths; default: all.

    Raises:
        EvalError: naming the file and line that is not as described, a task or length that is not
            there, or two samples of one number.
    """
    if not folder.is_dir():
        raise EvalError(f"--tasks is {folder}, must be a folder")
    files = sorted(path for path in folder.rglob("*.jsonl*") if _suffix(path))
    if not files:
        raise EvalError(f"--tasks is {folder}, which holds no .jsonl file")
    samples = [sample for path in files for sample in _read_file(path, folder)]
    there = dict.fromkeys(sample.task for sample in samples)
    for task in tasks or ():
        if task not in there:
            raise EvalError(f"there is no task {task!r} in {folder}; there are {', '.join(there)}")
    lengths = {sample.context for sample in samples}
    for context in contexts or ():
        if context not in lengths:
            known_lengths = ", ".join(map(str, sorted(lengths)))
            raise EvalError(f"there is nothing at {context} tokens in {folder}: {known_lengths}")
    known: set[tuple[Any, ...]] = set()
    for sample in samples:
        if sample.number in known:
            raise EvalError(
                f"{folder} holds two samples {sample.index} of {sample.task} at {sample.context}"
            )
        known.add(sample.number)
    names = [*TASKS, *(task for task in there if task not in TASKS)]
    samples = [
        sample
        for sample in samples
        if (not tasks or sample.task in tasks) and (not contexts or sample.context in contexts)
    ]
    return sorted(
        samples, key=lambda one: (one.context, one.question, names.index(one.task), one.index)
    )


def draw(samples: Sequence[Sample], number: int | None, seed: int) -> list[Sample]:
    """Keep at most this many samples of each task, context and question, drawn by a seed."""
    groups: dict[tuple[int, str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.context, sample.task, sample.question), []).append(sample)
    kept: list[Sample] = []
    for (context, task, _), group in groups.items():
        if number is not None and number < len(group):
            chosen = random.Random(f"{seed} {context} {task}").sample(range(len(group)), number)
            group = [group[index] for index in sorted(chosen)]
        kept += group
    return kept


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def _read_file(path: Path, folder: Path) -> Iterator[Sample]:
    suffix = _suffix(path)
    assert suffix is not None
    stem = path.name.removesuffix(suffix)
    task = stem if stem in TASKS or path.parent == folder else path.parent.name
    task = task if task in TASKS else stem
    try:
        text = SUFFIXES[suffix](path.read_bytes()).decode()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise EvalError(f"{path} cannot be read ({error})") from None
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(filter(None, text.split("\n")), 1):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError
        except ValueError:
            raise EvalError(f"{path}, line {number}: not a JSON object") from None
        lines.append(fields)
    folders = (folder.resolve().name, *path.relative_to(folder).parts[:-1])
    named = next((name for name in reversed(folders) if name.isdecimal()), None)
    context = int(named) if named else max((_whole(x.get("length")) or 0 for x in lines), default=0)
    for number, fields in enumerate(lines, 1):
        try:
            yield _sample({"task": task, "context": context, "index": number - 1} | fields)
        except ValueError as error:
            raise EvalError(f"{path}, line {number}: {error}") from None


def _sample(fields: dict[str, Any]) -> Sample:
    """Check one line's fields; raises ValueError that names the field."""
    task = fields["task"]
    usual = TASKS.get(task)
    outputs = fields.get("outputs")
    if not isinstance(fields.get("input"), str) or not fields["input"]:
        raise ValueError("'input' must be a prompt")
    if (
        not isinstance(outputs, list)
        or not outputs
        or not all(isinstance(output, str) and output for output in outputs)
    ):
        raise ValueError("'outputs' must be a list of strings, at least one")
    metric = fields.get("metric", usual and usual.metric)
    if metric not in METRICS:
        raise ValueError(f"'metric' of task {task!r} is {metric!r}, must be all or part")
    answer = fields.get("max_new_tokens", usual and usual.max_new_tokens)
    context = fields["context"]
    for name, value in (("max_new_tokens", answer), ("context", context)):
        if _whole(value) is None:
            raise ValueError(f"{name!r} is {value!r}, must be a whole number from 1")
    index = fields["index"]
    if index != 0 and _whole(index) is None:
        raise ValueError(f"'index' is {index!r}, must be a whole number from 0")
    question, seed = fields.get("question", END), fields.get("seed")
    if question not in QUESTIONS:
        raise ValueError(f"'question' is {question!r}, must be {' or '.join(QUESTIONS)}")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"'seed' is {seed!r}, must be a whole number")
    return Sample(
        task, context, index, fields["input"], tuple(outputs), int(answer or 0), metric,
        _whole(fields.get("length")), fields.get("add_special_tokens", True) is not False,
        question, seed,
    )  # fmt: skip


def _whole(value: Any) -> int | None:
    """Return a whole number from 1, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
