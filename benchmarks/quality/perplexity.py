"""``s2o eval perplexity``: how well a running server predicts long real text, budget by budget.

Windows of a text, evenly spaced, are sent as prompts with vLLM's ``prompt_logprobs``; the same
windows at every budget, so differences to dense (budget 1.0) are paired. Perplexity hardly sees
distant context: the last tokens of a window (``--tail``), which have the longest history, are
reported on their own, and retrieval (``s2o eval ruler``) is the harder test.

A request for prompt_logprobs never reads vLLM's prefix cache, so every window is prefilled whole,
whatever was asked before. The server holds a prefill chunk's logits over the whole vocabulary in
fp32: with little memory to spare start it with a smaller --max-num-batched-tokens.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..result_file import save
from . import client
from .intervals import mean_student
from .samples import EvalError, Row, Samples, dense_of
from .tables import perplexity_table
from .windows import Window, consecutive, log_probabilities, read_text

KEY = ("model", "text", "context", "tail", "window", "prompt", "backend", "setting", "budget")
WHERE = ("model", "text", "context", "tail", "backend", "setting", "budget")
OLDER: Row = {"setting": ""}  # what older files do not say
DENSE = 1.0


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval perplexity", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add("--context", type=client.count, default=16384, metavar="TOKENS", help="of a window")
    add("--windows", type=client.count, default=4, metavar="N", help="default: %(default)s")
    add("--tail", type=client.count, default=2048, metavar="TOKENS",
        help="a window's last tokens, averaged on their own (default: %(default)s)")  # fmt: skip
    client.add_options(parser, "perplexity.json")
    return parser


def read_windows(args: argparse.Namespace, target: client.Target) -> list[Window]:
    """Cut the text into windows, by the server's own tokenizer.

    Raises:
        EvalError: if the text cannot be read or is too short, or the server's context is.
    """
    if args.tail >= args.context:
        raise EvalError(f"--tail is {args.tail}, must be less than --context ({args.context})")
    if target.longest is not None and args.context >= target.longest:
        raise EvalError(
            f"--context is {args.context}, must be less than the server's {target.longest} "
            "(--max-model-len): it answers with one token more"
        )
    return consecutive(target, read_text(args.text, "--text"), args.context, args.windows)


def ask(
    complete: Callable[..., Any], target: client.Target, args: argparse.Namespace,
    budget: float, window: Window,
) -> Row:  # fmt: skip
    """Ask one window; return its raw row.

    ``nll`` is the mean negative log-likelihood of all its tokens but the first, ``tail_nll`` that
    of the last ``args.tail``; both in nats a token.
    """
    choice = complete(
        budget,
        prompt=window.tokens,
        max_tokens=1,
        seed=args.seed,
        extra_body={"prompt_logprobs": 0},
    )
    row = place(target, args, budget, window)
    if isinstance(choice, dict):
        return row | choice
    known = log_probabilities(choice, window.tokens)
    if known is None:
        return row | {"error": "the answer lacks prompt_logprobs of every token"}
    losses = [-one for one in known]
    tail = losses[-args.tail :]
    return row | {
        "nll": sum(losses) / len(losses),
        "tail_nll": sum(tail) / len(tail),
        "tokens": len(losses),
    }


def place(target: client.Target, args: argparse.Namespace, budget: float, window: Window) -> Row:
    """Return the fields that tell a question from others."""
    return where_asked(target, args, budget) | {"window": window.number, "prompt": window.digest}


def where_asked(target: client.Target, args: argparse.Namespace, budget: float) -> Row:
    """Return the fields that tell a run of questions from others."""
    return {
        "model": target.name,
        "text": args.text.stem,
        "context": args.context,
        "tail": args.tail,
        "backend": target.backend,
        "setting": target.setting,
        "budget": budget,
    }


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Ask what is missing and write the result file; return this run's questions, raw.

    Raises:
        EvalError: with one sentence for the user; answers kept until then stay.
    """
    target = client.connect(args)
    windows = read_windows(args, target)
    raw = args.samples_file or args.out.with_name(args.out.stem + "_samples.jsonl")
    samples = Samples(raw, target.header, KEY, OLDER)
    complete = client.complete(target, args.timeout)
    try:
        for budget in args.budgets:
            missing = [
                window
                for window in windows
                if not samples.answered(place(target, args, budget, window))
            ]
            where = where_asked(target, args, budget)
            question = partial(ask, complete, target, args, budget)
            with client.counting(target, samples, where, active=bool(missing)):
                label = f"{args.text.stem}, budget {budget:g}"
                client.ask_all(missing, question, samples, args.concurrency, label)
    finally:
        if samples.rows:
            save(args.out, samples.head, summarise(samples))
    asked = [place(target, args, *one) for one in product(args.budgets, windows)]
    return samples.of(asked)


def summarise(samples: Samples) -> list[Row]:
    """Return the result rows of all raw rows, one a text, context and budget.

    ``nll`` and ``tail_nll`` are means over windows in nats a token, ``perplexity`` and
    ``tail_perplexity`` their exponentials. ``difference`` and ``tail_difference`` are the means
    of nll less dense's on the ``paired`` windows, with Student's 95 % bounds over windows; null
    for dense itself, and bounds null for one window.
    """
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in samples.rows:
        groups.setdefault(tuple(row[name] for name in WHERE), {})[row["prompt"]] = row
    result = []
    for key in sorted(groups, key=lambda key: (*key[:-1], -key[-1])):
        where = dict(zip(WHERE, key, strict=True))
        dense = dense_of(groups, key) or {}
        own = {prompt: row for prompt, row in groups[key].items() if "error" not in row}
        pairs = [
            (row, dense[prompt])
            for prompt, row in own.items()
            if prompt in dense and "error" not in dense[prompt]
        ]
        summary: Row = dict(where)
        for kind, name in (("nll", "perplexity"), ("tail_nll", "tail_perplexity")):
            mean = sum(one[kind] for one in own.values()) / len(own) if own else None
            summary[kind] = _rounded(mean)
            summary[name] = None if mean is None else round(math.exp(mean), 3)
        for kind, name in (("nll", "difference"), ("tail_nll", "tail_difference")):
            values = [one[kind] - other[kind] for one, other in pairs]
            interval = mean_student(values) if values else (None, None, None)
            names = (name, f"{name}_low", f"{name}_high")
            summary |= dict(zip(names, map(_rounded, interval), strict=True))
        summary |= {
            "samples": len(own),
            "failed": len(groups[key]) - len(own),
            "paired": len(pairs),
            "density": _rounded(client.density(samples.counters, where)),
        }
        result.append(summary)
    return result


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see :func:`client.run`."""
    return client.run(build_parser(), argv, evaluate, perplexity_table)


if __name__ == "__main__":
    sys.exit(main())
