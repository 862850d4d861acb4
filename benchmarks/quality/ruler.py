"""``s2o eval ruler``: a running server's answers to RULER's tasks, budget by budget.

Every sample is asked once at every budget, greedily; budget 1.0 is dense attention on the same
server. Scores are RULER's (the share of the wanted strings that the answer holds, in percent) with
95 % intervals, and each budget's difference to dense on the same samples. Answers are kept as they
come; run again, only what is missing is asked. Prompts of another seed are added to the same file.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..result_file import save
from . import client
from .intervals import Interval, mean_difference, mean_of, mean_share
from .ruler_questions import END
from .ruler_tasks import TASKS, Sample, draw, read_tasks, score
from .samples import EvalError, Row, Samples, dense_of
from .tables import ruler_tables

KEY = ("model", "context", "task", "question", "prompt", "backend", "setting", "budget")
WHERE = ("model", "context", "question", "backend", "setting", "budget")
OLDER: Row = {"question": END, "seed": None, "setting": ""}  # what older files do not say
MEAN = "mean"  # the task's name in rows that average over tasks
EPILOG = """\
The folder of tasks is made by RULER's generator for a tokenizer and a length, see
s2o eval ruler-tasks --help; the format is described in benchmarks/quality/ruler_tasks.py.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval ruler", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--tasks", type=Path, required=True, metavar="DIR", help="folder of task files")
    add("--only", nargs="+", metavar="TASK", help="some of the folder's tasks")
    add("--contexts", nargs="+", type=client.count, metavar="TOKENS",
        help="some of the folder's lengths")  # fmt: skip
    add("--samples", type=client.count, metavar="N",
        help="ask N of each task, length and place of the question, drawn by the seed")  # fmt: skip
    client.add_options(parser, "ruler.json")
    return parser


def ask(
    complete: Callable[..., Any], target: client.Target, budget: float, seed: int, sample: Sample
) -> Row:
    """Ask one sample and return its raw row, with ``score`` in [0, 1] or ``error``."""
    choice = complete(
        budget,
        prompt=sample.input,
        max_tokens=sample.max_new_tokens,
        seed=seed,
        extra_body={"add_special_tokens": sample.add_special_tokens},
    )
    row = place(target, budget, sample)
    if isinstance(choice, dict):
        return row | choice
    answer = choice.text.strip()
    return row | {
        "score": score(answer, sample.outputs, sample.metric),
        "answer": answer,
        "outputs": list(sample.outputs),
        "finish": choice.finish_reason,
    }


def place(target: client.Target, budget: float, sample: Sample) -> Row:
    """Return the fields that tell a question from others."""
    return where_asked(target, sample.context, sample.question, budget) | {
        "task": sample.task,
        "seed": sample.seed,
        "index": sample.index,
        "prompt": sample.digest,
    }


def check(target: client.Target, wanted: Sequence[Sample], samples: Samples) -> None:
    """Refuse what would give a wrong result.

    Raises:
        EvalError: if a sample is longer than the server allows, or the raw file holds answers to
            other prompts of the same seed and number: of another tokenizer or chat template.
    """
    longest = max(sample.length or 0 for sample in wanted)
    if target.longest is not None and longest > target.longest:
        raise EvalError(
            f"the longest sample is {longest} tokens with its answer, must be at most the server's "
            f"{target.longest} (--max-model-len)"
        )
    prompts = {one.number: one.digest for one in wanted}
    for row in samples.rows:
        number = tuple(row[key] for key in ("context", "task", "question", "seed", "index"))
        if row["model"] == target.name and prompts.get(number, row["prompt"]) != row["prompt"]:
            raise EvalError(
                f"{samples.path} holds answers to another prompt {row['index']} of {row['task']} "
                f"at {row['context']}: name another --samples-file"
            )


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Ask what is missing and write the result file; return this run's questions, raw.

    Raises:
        EvalError: with one sentence for the user; answers kept until then stay.
    """
    wanted = draw(read_tasks(args.tasks, args.only, args.contexts), args.samples, args.seed)
    target = client.connect(args)
    raw = args.samples_file or args.out.with_name(args.out.stem + "_samples.jsonl")
    samples = Samples(raw, target.header, KEY, OLDER)
    check(target, wanted, samples)
    complete = client.complete(target, args.timeout)
    try:
        places = sorted({(one.context, one.question) for one in wanted})
        for (context, question), budget in product(places, args.budgets):
            missing = [
                sample
                for sample in wanted
                if (sample.context, sample.question) == (context, question)
                and not samples.answered(place(target, budget, sample))
            ]
            asking = partial(ask, complete, target, budget, args.seed)
            where = where_asked(target, context, question, budget)
            with client.counting(target, samples, where, active=bool(missing)):
                label = f"{context} tokens, question at the {question}, budget {budget:g}"
                client.ask_all(missing, asking, samples, args.concurrency, label)
    finally:
        if samples.rows:
            save(args.out, samples.head, summarise(samples))
    asked = [place(target, budget, one) for one, budget in product(wanted, args.budgets)]
    return samples.of(asked)


def where_asked(target: client.Target, context: int, question: str, budget: float) -> Row:
    """Return the fields that tell a run of questions from others."""
    return {
        "model": target.name,
        "context": context,
        "question": question,
        "backend": target.backend,
        "setting": target.setting,
        "budget": budget,
    }


def summarise(samples: Samples) -> list[Row]:
    """Return the result rows of all raw rows: each task and budget, and means over tasks.

    Scores, bounds and differences are in percent; ``samples`` counts answers and ``failed``
    refusals. ``difference`` is to budget 1.0 on the ``paired`` samples that both answered, null
    for dense itself and where nothing is paired. A setting without dense answers is compared with
    those of the empty setting. ``density`` is the share of the history that was visited, of a
    context and budget over all tasks, null where the server does not count it.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in samples.rows:
        key = tuple(row[name] for name in WHERE)
        groups.setdefault(key, {}).setdefault(row["task"], []).append(row)
    result = []
    for key in sorted(groups, key=lambda key: (*key[:-1], -key[-1])):
        where = dict(zip(WHERE, key, strict=True))
        dense = dense_of(groups, key) or {}
        density = client.density(samples.counters, where)
        ordered = [*TASKS, *sorted(groups[key])]
        parts = {
            task: _task(groups[key][task], dense.get(task, []))
            for task in dict.fromkeys(ordered)
            if task in groups[key]
        }
        result += [_row(where, task, density, part) for task, part in parts.items()]
        mean = _row(where, MEAN, density, _mean(list(parts.values())))
        result.append(mean | {"tasks": len(parts)})
    return result


class Part(NamedTuple):
    """A task's score and difference to dense, and how many were answered, refused, paired."""

    mean: Interval | None
    difference: Interval | None
    answered: int
    failed: int
    paired: int


def _task(rows: Sequence[Row], dense: Sequence[Row]) -> Part:
    scores = {row["prompt"]: row["score"] for row in rows if "error" not in row}
    others = {row["prompt"]: row["score"] for row in dense if "error" not in row}
    both = [prompt for prompt in scores if prompt in others]
    difference = None
    if both:
        difference = mean_difference([scores[p] for p in both], [others[p] for p in both])
    mean = mean_share(list(scores.values())) if scores else None
    return Part(mean, difference, len(scores), len(rows) - len(scores), len(both))


def _mean(parts: Sequence[Part]) -> Part:
    """Average over tasks; a task without an answer leaves no mean."""
    means = [part.mean for part in parts if part.mean is not None]
    differences = [part.difference for part in parts if part.difference is not None]
    return Part(
        mean_of(means) if len(means) == len(parts) else None,
        mean_of(differences) if len(differences) == len(parts) else None,
        sum(part.answered for part in parts),
        sum(part.failed for part in parts),
        sum(part.paired for part in parts),
    )


def _row(where: Row, task: str, density: float | None, part: Part) -> Row:
    def percent(interval: Interval | None, *names: str) -> Row:
        values = interval or (None, None, None)
        return {
            name: None if value is None else round(100 * value, 2)
            for name, value in zip(names, values, strict=True)
        }

    return {
        "model": where["model"],
        "context": where["context"],
        "task": task,
        "question": where["question"],
        "backend": where["backend"],
        "budget": where["budget"],
        "setting": where["setting"],
        **percent(part.mean, "score", "low", "high"),
        "samples": part.answered,
        "failed": part.failed,
        **percent(part.difference, "difference", "difference_low", "difference_high"),
        "paired": part.paired,
        "density": None if density is None else round(density, 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see :func:`client.run`."""
    return client.run(build_parser(), argv, evaluate, ruler_tables)


if __name__ == "__main__":
    sys.exit(main())
