"""Nats lost on RULER's wanted answers by a model in this process, without a server.

``python -m s2o_vllm.benchmarks.research.answers MODEL --tasks DIR --only niah_multikey_2`` reads
each prompt with the first string that its answer should hold, densely and sparsely, and prints how
much less likely sparse attention makes that string: a second a prompt on a GPU, and a number for
each prompt where a score is 0 or 1. ``hit`` is the share of strings of which every token is the
likeliest one. ``--lists exact`` and :mod:`tuned` separate the causes: the ranking's estimate, or
what represents skipped tokens.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.config import RANKINGS

from ..quality.intervals import mean_student
from ..quality.ruler_tasks import draw, read_tasks
from ..quality.samples import EvalError
from ..result_file import header, save
from . import tuned


class Prompt(NamedTuple):
    """A prompt with its answer.

    Attributes:
        task: of RULER.
        context: length it was made for, in tokens.
        question: ``end`` or ``start``: where the question stands.
        tokens: of the prompt and the wanted string.
        first: the string's first token.
    """

    task: str
    context: int
    question: str
    tokens: list[int]
    first: int


def read_prompts(args: argparse.Namespace, encode: Any) -> list[Prompt]:
    """Read and tokenise the samples; the wanted string follows a space."""
    samples = draw(read_tasks(args.tasks, args.only, args.contexts), args.samples, args.seed)
    prompts = []
    for sample in samples:
        before = encode(sample.input)
        wanted = encode(" " + sample.outputs[0].strip(), add_special_tokens=False)
        prompts.append(
            Prompt(sample.task, sample.context, sample.question, before + wanted, len(before))
        )
    return prompts


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.research.answers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--tasks", type=Path, required=True, metavar="DIR", help="RULER's, see s2o eval ruler")
    add("--only", nargs="+", metavar="TASK", help="some of the tasks")
    add("--contexts", nargs="+", type=int, metavar="TOKENS", help="some of the lengths")
    add("--samples", type=int, metavar="N", help="of each task and length (default: all)")
    add("--seed", type=int, default=0)
    add("--lists", nargs="+", choices=("served", "exact"), default=["served"])
    add("--rankings", nargs="+", choices=RANKINGS, default=["low_rank"])
    add("--budgets", nargs="+", type=float, default=[0.0125], metavar="B")
    add("--min-budget-tokens", type=int, default=1024, metavar="TOKENS")
    add("--chunk", type=int, default=8192, metavar="TOKENS")
    add("--device", help="default: cuda if there is one")
    add("--out", type=Path, default=Path("benchmarks/results/quality_answers.json"))
    return parser


def judge(
    model: Any, prompts: Sequence[Prompt], attentions: Sequence[Any], dense: Any
) -> Iterator[list[tuple[float, bool]]]:
    """Yield the nats of each prompt and whether it is a hit: of dense attention, then of others."""
    for prompt in prompts:
        results = []
        for attention in (dense, *attentions):
            known, best = model.read(prompt.tokens, prompt.first, attention)
            results.append((-sum(known), all(best)))
        yield results


def rows_of(
    args: argparse.Namespace,
    prompts: Sequence[Prompt],
    found: Sequence[Sequence[tuple[float, bool]]],
    settings: Sequence[Any],
    attentions: Sequence[Any],
) -> list[dict[str, Any]]:
    """Return the rows of a result file, from the first prompts' results as `judge` yields them."""
    rows = []
    done = prompts[: len(found)]
    for task, context, question in sorted({prompt[:3] for prompt in done}):
        own = [n for n, one in enumerate(done) if one[:3] == (task, context, question)]
        dense_hits = sum(found[n][0][1] for n in own) / len(own)
        for arm, (setting, attention) in enumerate(zip(settings, attentions, strict=True), 1):
            value, low, high = mean_student([found[n][arm][0] - found[n][0][0] for n in own])
            rows.append(
                {"model": args.model.name, "task": task, "context": context, "question": question}
                | setting._asdict()
                | {"tuned": dict(tuned.CHANGED), "samples": len(own)}
                | {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
                | {"hit": round(sum(found[n][arm][1] for n in own) / len(own), 4)}
                | {"dense_hit": round(dense_hits, 4), "density": attention.density}
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    import torch
    from transformers import AutoTokenizer

    from .in_process import Attention, Model, settings_of

    try:
        prompts = read_prompts(args, AutoTokenizer.from_pretrained(args.model).encode)
    except EvalError as error:
        print(f"answers: {error}", file=sys.stderr)
        return 2
    longest = max(len(prompt.tokens) for prompt in prompts)
    settings = settings_of(args)
    attentions = [Attention(setting, longest) for setting in settings]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: list[list[tuple[float, bool]]] = []
    for results in judge(Model(args.model, device), prompts, attentions, Attention(None, longest)):
        found.append(results)
        rows = rows_of(args, prompts, found, settings, attentions)
        save(args.out, header(), rows)  # each as it comes: a machine may be gone before the last
    for row in rows:
        print(
            f"{row['task']} {row['context']} {row['question']:>5} {row['lists']:>6}"
            f" {row['ranking']} budget "
            f"{row['budget']:<6} {row['value']:+.3f} nats [{row['low']:+.3f}, {row['high']:+.3f}], "
            f"hit {row['hit']:.3f} of {row['dense_hit']:.3f} ({row['samples']} prompts)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
