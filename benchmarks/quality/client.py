"""A running server: who it is, which budgets it takes, and many questions to it at once."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from s2o_vllm.loadtest.arms import Arm, LoadTestError
from s2o_vllm.loadtest.report import header
from s2o_vllm.loadtest.server import REFUSED_BUDGET, fetch, history_counters, inspect

from .samples import EvalError, Row, Samples
from .tables import Result, read_result

BUDGET_KEY = "s2o_sparsity_budget"
SETTLE = 1.5  # seconds until the server's counters have caught up with its last request
RETRIES = 2  # of an answer that did not come or that the server could not give just then
ERROR_LENGTH = 300  # characters of a server's message that are kept
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """The server that is asked.

    Attributes:
        url: without a path.
        model: the served name.
        name: the model's in results, see `loadtest.server.Server`.
        longest: prompt and answer together in tokens, None where the server does not say.
        backend: ``s2o``, or ``stock`` for a server without budgets.
        setting: the user's label of the settings that it was started with.
        header: what result files begin with.
    """

    url: str
    model: str
    name: str
    longest: int | None
    backend: str
    setting: str
    header: Row

    @property
    def arm(self) -> Arm:
        """The server as the load test's helpers take it."""
        return Arm("--url", self.url)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server is asked, and how; `words` passes them on."""
    add = parser.add_argument
    add("--url", required=True, help="an OpenAI-compatible server, such as http://localhost:8000")
    add("--model", help="served model (default: the server's first)")
    add("--budgets", nargs="+", type=budget, default=[1.0, 0.1], metavar="B",
        help="sparsity budgets to ask at; 1.0 is dense (default: 1.0 0.1)")  # fmt: skip
    add("--setting", default="", metavar="LABEL",
        help="names what the server was started with; labels are never mixed")  # fmt: skip
    add("--concurrency", type=count, default=4, help="questions at once (default: %(default)s)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="for one answer")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--device", help="what the server runs on (default: asked, or this machine)")


def words(args: argparse.Namespace) -> list[str]:
    """Return the options of `add_server_options` again, for another command's parser."""
    given = ["--budgets", *map(str, args.budgets)]
    for name in ("url", "model", "setting", "concurrency", "timeout", "seed", "device"):
        value = getattr(args, name)
        given += [] if value is None else [f"--{name}={value}"]
    return given


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that every evaluation of a running server has."""
    add_server_options(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("benchmarks/results") / out, metavar="FILE",
        help="default: %(default)s")  # fmt: skip
    add("--samples-file", type=Path, metavar="FILE",
        help="raw answers, continued where they end (default: OUT_samples.jsonl)")  # fmt: skip


def count(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be a whole number from 1")
    return int(text)


def budget(text: str) -> float:
    """Read a share above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be above 0 and at most 1")
    return value


def connect(args: argparse.Namespace) -> Target:
    """Find out who answers and whether every budget will be taken.

    Raises:
        EvalError: if nobody answers, the model is not served, or a budget is refused or would be
            ignored.
    """
    parts = urlsplit(args.url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise EvalError(f"--url is {args.url!r}, must be like http://localhost:8000")
    arm = Arm("--url", args.url.rstrip("/").removesuffix("/v1"))
    try:
        server = inspect(arm, args.model)
        status, said = _try(arm.url, server.model, REFUSED_BUDGET)
        backend = "stock" if status == 200 else "s2o"
        if status not in (200, 400):
            raise EvalError(f"{arm.url} answered a first question with HTTP {status}: {said}")
        for wanted in args.budgets:
            if backend == "stock" and wanted < 1:
                raise EvalError(
                    f"{arm.url} ignores budget {wanted:g}, must be a server that was started with "
                    "--attention-backend s2o"
                )
            status, said = _try(arm.url, server.model, wanted)
            if status != 200:
                raise EvalError(f"{arm.url} refuses budget {wanted:g} (HTTP {status}): {said}")
    except (LoadTestError, OSError) as error:
        raise EvalError(str(error)) from None
    head = header([server], args.device)
    return Target(
        arm.url, server.model, server.name, server.max_model_len, backend, args.setting, head
    )


def _try(url: str, model: str, wanted: float) -> tuple[int, str]:
    """Ask for one token at a budget; return the status and the server's words on it."""
    body = {"model": model, "prompt": "1", "max_tokens": 1, "vllm_xargs": {BUDGET_KEY: wanted}}
    status, text = fetch(url + "/v1/completions", body)
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = text
    return status, str(said)[:ERROR_LENGTH]


def complete(target: Target, timeout: float) -> Callable[..., Any]:
    """Return a function that asks for one completion, greedily.

    It takes ``budget`` and the arguments of the ``openai`` client's ``completions.create``, and
    returns the first choice, or a row's ``{"error": …}`` where the server refuses.

    Raises (the function):
        EvalError: if the server no longer answers at all.
    """
    import openai

    key = os.environ.get("OPENAI_API_KEY", "none")
    client: Any = openai.OpenAI(
        base_url=f"{target.url}/v1", api_key=key, timeout=timeout, max_retries=RETRIES
    )

    def ask(budget: float, extra_body: Row | None = None, **arguments: Any) -> Any:
        extra = {"vllm_xargs": {BUDGET_KEY: budget}} | (extra_body or {})
        try:
            answer = client.completions.create(
                model=target.model, temperature=0, extra_body=extra, **arguments
            )
            return answer.choices[0]
        except openai.APITimeoutError:
            return {"error": f"no answer in {timeout:g} s"}
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise EvalError(f"{target.url} no longer answers ({reason}): run again to go on") from (
                None
            )
        except openai.APIStatusError as error:
            return {"error": f"HTTP {error.status_code}: {error.message}"[:ERROR_LENGTH]}

    return ask


def ask_all(
    questions: Sequence[T], ask: Callable[[T], Row], samples: Samples, at_once: int, label: str
) -> None:
    """Ask questions a few at a time, with a progress display, and keep every row as it comes.

    Raises:
        EvalError: as ``ask`` does; questions that were not begun are dropped.
    """
    from tqdm import tqdm

    failed = 0
    if not questions:
        return
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(questions), desc=label) as bar:
        futures = [pool.submit(ask, question) for question in questions]
        try:
            for future in as_completed(futures):
                row = future.result()
                samples.add(row)
                if "error" in row:
                    failed += 1
                    bar.set_postfix_str(f"{failed} refused")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def counting(target: Target, samples: Samples, where: Row, active: bool = True) -> Iterator[None]:
    """Record the density of what runs inside, from the server's counters: nothing else may run."""
    active = active and target.backend == "s2o"
    # The counters appear on the server's page with the first sparse prefill.
    before = (active and history_counters(target.arm)) or {"visited": 0.0, "eligible": 0.0}
    yield
    if not active:
        return
    time.sleep(SETTLE)
    after = history_counters(target.arm)
    if after is not None and after["eligible"] > before["eligible"]:
        samples.add(where | {"counters": {key: after[key] - before[key] for key in after}})


def density(lines: Iterable[Row], where: Row) -> float | None:
    """Return the share of history visited where these fields agree, None if not known."""
    own = [
        line["counters"]
        for line in lines
        if all(line.get(key) == value for key, value in where.items())
    ]
    eligible = sum(counters["eligible"] for counters in own)
    return sum(counters["visited"] for counters in own) / eligible if eligible else None


def tell_refusals(rows: Sequence[Row]) -> str | None:
    """Return one sentence on refused questions with the most frequent reason, None without any."""
    errors = [row["error"] for row in rows if "error" in row]
    if not errors:
        return None
    most = max(dict.fromkeys(errors), key=errors.count)
    return (
        f"{len(errors)} of {len(rows)} questions were refused, {errors.count(most)} of them with: "
        f"{most}"
    )


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    evaluate: Callable[[argparse.Namespace], list[Row]],
    show: Callable[[Result | None], str],
) -> int:
    """Run an evaluation's command and print its tables.

    Args:
        parser: of the command; its ``--out`` is the result file.
        argv: arguments, those of the process by default.
        evaluate: asks and writes the result file; returns this run's questions.
        show: turns the result file's content into tables.

    Returns:
        0 when every question was answered, 1 when some were refused, 2 when it cannot work.
    """
    args = parser.parse_args(argv)
    try:
        asked = evaluate(args)
    except EvalError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(show(read_result(args.out)))
    print(f"rows: {args.out}")
    if refusals := tell_refusals(asked):
        print(f"{parser.prog}: {refusals}", file=sys.stderr)
        return 1
    return 0
