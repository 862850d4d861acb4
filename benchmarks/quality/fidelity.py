"""``s2o eval fidelity``: what the mean error of attention does not see, of a running server.

Budgets are compared with budget 1.0, dense attention, on the same prompts and the same server:

far_tokens_text, far_tokens_code
  Nats lost on tokens of real text and source code whose dense prediction needs far context, in
  the manner of LongPPL (arXiv 2410.23771), over all and by the distance of what they need.
agreement
  Share of greedy answers whose first 64 tokens are dense attention's, and the mean length of
  their common beginning. The prompts are windows of the same text and code. Dense attention is
  asked twice: how far it agrees with itself is the row of budget 1.0.

Answers are kept as they come; run again, only what is missing is asked. A request for
prompt_logprobs never reads vLLM's prefix cache, and the server holds a prefill chunk's logits over
the whole vocabulary in fp32: with little memory to spare start it with a smaller
--max-num-batched-tokens.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ..result_file import save
from . import agreement, client, far_tokens
from .samples import DENSE, EvalError, Row, Samples, dense_of
from .tables import fidelity_tables
from .windows import Text, Window, ending, library_code, read_text

AGREEMENT = "agreement"
FAR = {"text": "far_tokens_text", "code": "far_tokens_code"}
WHATS = (*FAR.values(), AGREEMENT)
JUDGED = 2048  # last tokens of a window that are judged
NEAR = 2048  # tokens of context that a far token does not get by with
WHERE = ("model", "context", "what", "source", "judged", "near", "backend", "setting", "budget")
KEY = (*WHERE, "prompt", "reach", "again")


class Question(NamedTuple):
    """One question: a window, and how it is asked.

    Attributes:
        what: of `WHATS`.
        source: name of the text.
        context: length of the window in tokens.
        judged: tokens that are judged; of an answer where ``what`` is `AGREEMENT`.
        near: tokens that a far token does not get by with; 0 for `AGREEMENT`.
        budget: the sparsity budget.
        window: the prompt, or what prompts are cut out of.
        reach: tokens of context that a judged token sees.
        again: 1 where dense attention is asked a second time.
    """

    what: str
    source: str
    context: int
    judged: int
    near: int
    budget: float
    window: Window
    reach: int
    again: int = 0

    def place(self, target: client.Target) -> Row:
        """Return the fields that tell a question from others."""
        return self.where(target) | {
            "window": self.window.number,
            "prompt": self.window.digest,
            "reach": self.reach,
            "again": self.again,
        }

    def where(self, target: client.Target) -> Row:
        """Return the fields that tell a run of questions from others."""
        fields = self._asdict() | {
            "model": target.name, "backend": target.backend, "setting": target.setting
        }  # fmt: skip
        return {name: fields[name] for name in WHERE}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o eval fidelity", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--texts", nargs="+", type=named_file, default=[], metavar="NAME=FILE",
        help="text=FILE and code=FILE, UTF-8 (default for code: the large modules of this "
        "Python's standard library)")  # fmt: skip
    add("--what", nargs="+", choices=WHATS, default=list(WHATS), metavar="WHAT",
        help=f"some of {', '.join(WHATS)}")  # fmt: skip
    add("--context", nargs="+", type=client.count, default=[32768], metavar="TOKENS",
        help="lengths of a window (default: 32768)")  # fmt: skip
    add("--windows", type=client.count, default=8, metavar="N",
        help="windows of each text whose far tokens are judged (default: %(default)s)")  # fmt: skip
    add("--judged", type=client.count, default=JUDGED, metavar="TOKENS",
        help="a window's last tokens, judged (default: %(default)s)")  # fmt: skip
    add("--near", type=client.count, default=NEAR, metavar="TOKENS",
        help="context that a far token does not get by with (default: %(default)s)")  # fmt: skip
    add("--answers", type=client.count, default=32, metavar="N",
        help="answers to each text that are compared (default: %(default)s)")  # fmt: skip
    client.add_options(parser, "fidelity.json")
    return parser


def named_file(text: str) -> tuple[str, Path]:
    """Read ``text=FILE`` or ``code=FILE``."""
    name, mark, path = text.partition("=")
    if name not in FAR or not mark or not path:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be text=FILE or code=FILE")
    return name, Path(path)


def read_texts(args: argparse.Namespace) -> dict[str, Text]:
    """Return the texts that are needed, by kind.

    Raises:
        EvalError: if one cannot be read, or the text is not named.
    """
    given = dict(args.texts)
    texts = {kind: read_text(path, "--texts") for kind, path in given.items()}
    if FAR["text"] in args.what and "text" not in texts:
        raise EvalError("--texts names no text, must have text=FILE for far_tokens_text (--what)")
    if "code" not in texts and set(args.what) & {FAR["code"], AGREEMENT}:
        texts["code"] = library_code()
    return texts


def questions(
    args: argparse.Namespace, target: client.Target, texts: dict[str, Text]
) -> Iterator[Question]:
    """Yield what is to be asked, run by run.

    Raises:
        EvalError: if a text or the server's context is too short.
    """
    for context in args.context:
        least = args.judged + far_tokens.DENSE_END + far_tokens.reaches(args.near, context)[-1]
        if context < least:
            raise EvalError(
                f"--context is {context}, must be {least} at least for --judged {args.judged} and "
                f"--near {args.near}"
            )
        answer = agreement.ANSWER if AGREEMENT in args.what else 1
        if target.longest is not None and context + answer > target.longest:
            raise EvalError(
                f"--context is {context}, must leave room for an answer of {answer} in the "
                f"server's {target.longest} (--max-model-len)"
            )
        for kind, text in texts.items():
            if FAR[kind] in args.what:
                windows = ending(target, text, context, args.windows)
                for budget in args.budgets:
                    shorter = far_tokens.reaches(args.near, context) if budget == DENSE else []
                    for window in windows:
                        for reach in (context, *shorter):
                            yield Question(
                                FAR[kind], text.name, context, args.judged, args.near, budget,
                                window, reach,
                            )  # fmt: skip
            if AGREEMENT in args.what:
                windows = ending(target, text, context, args.answers)
                for budget in args.budgets:
                    for again in (0, 1) if budget == DENSE else (0,):
                        for window in windows:
                            yield Question(
                                AGREEMENT, text.name, context, agreement.ANSWER, 0, budget,
                                window, context, again,
                            )  # fmt: skip


def ask(complete: Any, target: client.Target, question: Question) -> Row:
    """Ask one question and return its raw row."""
    tokens = question.window.tokens
    if question.what == AGREEMENT:
        answer = agreement.ask(complete, question.budget, tokens)
    else:
        answer = far_tokens.ask(complete, question.budget, tokens, question.judged, question.reach)
    return question.place(target) | answer


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Ask what is missing and write the result file; return this run's questions, raw.

    Raises:
        EvalError: with one sentence for the user; answers kept until then stay.
    """
    texts = read_texts(args)
    target = client.connect(args)
    wanted = list(questions(args, target, texts))
    raw = args.samples_file or args.out.with_name(args.out.stem + "_samples.jsonl")
    samples = Samples(raw, target.header, KEY)
    complete = client.complete(target, args.timeout)
    try:
        for where, run in groupby(wanted, key=lambda one: one.where(target)):
            missing = [one for one in run if not samples.answered(one.place(target))]
            with client.counting(target, samples, where, active=bool(missing)):
                label = f"{where['what']}, {where['context']} tokens, budget {where['budget']:g}"
                asking = partial(ask, complete, target)
                client.ask_all(missing, asking, samples, args.concurrency, label)
    finally:
        if samples.rows:
            save(args.out, samples.head, summarise(samples))
    return samples.of(one.place(target) for one in wanted)


def summarise(samples: Samples) -> list[Row]:
    """Return the result rows of all raw rows.

    ``value`` with ``low`` and ``high`` is of far tokens the mean of nats lost over ``samples``
    tokens of ``windows`` windows, a row for each ``distance`` (tokens, or ``all``); of agreement
    the share of ``samples`` answers that are dense's, over all sources, beside ``prefix``, the
    mean length of the common beginning in tokens. ``failed`` counts refusals, ``density`` is the
    share of the history that was visited, null where the server does not count it.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in samples.rows:
        # Answers to all texts are one group.
        group = row | {"source": ""} if row["what"] == AGREEMENT else row
        groups.setdefault(tuple(group[name] for name in WHERE), []).append(row)
    result = []
    for key in sorted(groups, key=lambda key: (*key[:-1], -key[-1])):
        where = dict(zip(WHERE, key, strict=True))
        own, dense = groups[key], dense_of(groups, key) or []
        counted = {name: where[name] for name in WHERE if name != "source" or where["source"]}
        density = client.density(samples.counters, counted)
        rest = {
            "failed": sum("error" in row for row in own),
            "density": None if density is None else round(density, 4),
        }
        rows = _agreement(own, dense) if where["what"] == AGREEMENT else _far(own, dense, where)
        result += [where | row | rest for row in rows]
    return result


def _far(own: Sequence[Row], dense: Sequence[Row], where: Row) -> Iterator[Row]:
    """Yield rows of the nats that a budget loses; none for dense itself."""
    known: dict[str, dict[int, list[float]]] = {}
    for row in dense:
        if "error" not in row:
            known.setdefault(row["prompt"], {})[row["reach"]] = row["logprobs"]
    sparse = {row["prompt"]: row["logprobs"] for row in own if "error" not in row}
    for loss in far_tokens.losses(sparse, known, where["context"]):
        yield {
            "distance": loss.distance,
            **far_tokens.bounded(loss.mean),
            "samples": loss.tokens,
            "windows": loss.windows,
        }


def _agreement(own: Sequence[Row], dense: Sequence[Row]) -> Iterator[Row]:
    """Yield the row of a budget's agreement with dense; of dense, with its second answers."""

    def answers(rows: Sequence[Row], again: int) -> dict[str, list[int]]:
        found = [row for row in rows if row["again"] == again and "error" not in row]
        return {row["prompt"]: row["tokens"] for row in found}

    first, again, others = answers(own, 0), answers(own, 1), answers(dense, 0)
    found = agreement.compare(again, first) if again else agreement.compare(first, others)
    if found is not None:
        prefix = far_tokens.bounded(found.prefix, 2)
        yield {
            **far_tokens.bounded(found.share),
            "samples": found.pairs,
            "prefix": prefix["value"],
            "prefix_low": prefix["low"],
            "prefix_high": prefix["high"],
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see :func:`client.run`."""
    return client.run(build_parser(), argv, evaluate, fidelity_tables)


if __name__ == "__main__":
    sys.exit(main())
