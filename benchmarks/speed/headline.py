"""The table of results, from result files: what S2O buys, and what it costs.

The whole table stands in docs/benchmarks.md. README has the part that decides whether to use S2O.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from s2o_vllm.config import S2OConfig

from ..quality.plots import error_by_density
from ..quality.report import RANKINGS, of_method
from ..quality.samples import Row
from ..quality.tables import ALL, Result, needle_share, table
from ..result_file import RANDOM, REAL, inputs_of

SHAPE = "llama-3.1-8b"
MODEL = "qwen2.5-coder-1.5b"  # that errors are of
TEXT = "essays"
FEW_ERRORS = 0.02  # relative MSE up to which it counts
AT = 0.05  # the density at which methods are compared
OF_QUALITY = (
    "quality", "quality_needles", "ruler", "ruler_h200", "fidelity", "perplexity"
)  # fmt: skip
# Files that README's table is of, and how many lines of each subject.
IN_README = {
    "ttft": 2, "ruler_h200": 2, "fidelity": 1, "quality_needles": 1, "attention": 2,
    "decode": 1, "decode_sparse": 2,
}  # fmt: skip
Results = Mapping[str, Result | None]


def rows_of(results: Results, name: str) -> list[Row]:
    """Return a file's rows; none where it was not measured."""
    result = results.get(name)
    return list(result["rows"]) if result else []


def measured(results: Results, spec: str) -> list[Row]:
    """Return a method's rows of quality.json for the headline's model and text."""
    rows = of_method(rows_of(results, "quality"), spec)
    return [row for row in rows if (row["model"], row["text"]) == (MODEL, TEXT)]


def errors(rows: Sequence[Row]) -> dict[tuple[int, float], float]:
    """Return the mean relative MSE over layers and positions, by context and budget."""
    return {
        (context, point.budget): point.error
        for (_, _, context), points in error_by_density(rows).items()
        for point in points
    }


def times(value: float) -> str:
    """Return how many times."""
    return f"{value:.1f}x"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:g} %"


def about(share: float) -> str:
    """Return a measured share in percent."""
    return f"{100 * share:.1f} %"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        what: the quantity that was measured.
        found: its value.
        name: of the result file.
        commit: of the measurement, where rows of the file are of several commits.
        subject: the text that was read, where a file has several.
    """

    what: str
    found: str
    name: str
    commit: str = ""
    subject: str = ""


def card(device: str) -> str:
    """Return ``, H100`` of a device's name; nothing of one that is no such card."""
    found = re.search(r"NVIDIA (\w+)", device)
    return f", {found[1]}" if found else ""


def headline(results: Results, *, short: bool = False, root: str = "") -> str:
    """Return the table of results.

    Args:
        results: content of each result file, None where there is none.
        short: only the lines of ``IN_README``.
        root: from the page that holds the table to the repository's root, such as ``../``.
    """
    lines = [
        *(faithful_lines(results) or task_lines(results)),
        *needle_lines(results),
        *far_lines(results),
        *attention_lines(results),
        *quality_lines(results),
        *served_lines(results),
    ]
    rows = []
    taken: Counter[tuple[str, str]] = Counter()
    for what, found, name, commit, subject in lines:
        taken[name, subject] += 1
        if short and taken[name, subject] > IN_README.get(name, 0):
            continue
        result = results[name]
        assert result is not None
        quality = name in OF_QUALITY
        page = f"{root}benchmarks/{'QUALITY' if quality else 'SPEED'}.md"
        on = "" if quality else card(str(result.get("device")))
        age = str(commit or result.get("commit"))[:7]
        rows.append([what, found, f"[`{name}.json`]({page}) at {age}{on}"])
    return table(["", "", "from"], rows).replace("---:", "---")


def faithful_lines(results: Results) -> list[Line]:
    """Return times to first token beside the task scores of the same commit and budget."""
    speed, tasks = results.get("ttft"), results.get("ruler_h200")
    if not speed or not tasks or str(speed["commit"])[:7] != str(tasks["commit"])[:7]:
        return []
    longest = max(row["context"] for row in speed["rows"])
    own = {row["budget"]: row["ttft_s"] for row in speed["rows"] if row["context"] == longest}
    lines = []
    for row in tasks["rows"]:
        if row["task"] != "mean" or row["difference"] is None or row["budget"] not in own:
            continue
        stock, sparse = own[1.0], own[row["budget"]]
        names = ("difference", "difference_low", "difference_high")
        first = ", question first" if row.get("question") == "start" else ""
        change = "{:+.1f} points from dense [{:+.1f}, {:+.1f}]".format(*(row[n] for n in names))
        lines.append(
            Line(
                f"first token of {longest:,} tokens from `vllm serve`, budget {row['budget']:g}; "
                f"RULER at {row['context']:,}, {row['tasks']} tasks, "
                f"{row['paired']} prompts{first}",
                f"{sparse:.2f} s for stock's {stock:.2f}: **{stock / sparse:.2f}x**; {change}",
                "ttft",
            )
        )
    return lines


def task_lines(results: Results) -> list[Line]:
    """Return the latest task scores, where no time to first token of their commit is known."""
    return [
        Line(
            f"RULER, {row['context']:,} tokens, budget {setting_of(row)}, {row['tasks']} tasks, "
            f"{row['paired']} prompts, against dense",
            "{:+.1f} points [{:+.1f}, {:+.1f}]".format(
                *(row[f"difference{end}"] for end in ("", "_low", "_high"))
            ),
            "ruler_h200",
        )
        for row in rows_of(results, "ruler_h200")
        if row["task"] == "mean" and row["difference"] is not None
    ]


def far_lines(results: Results) -> list[Line]:
    """Return what budgets lose on tokens that need far context."""
    return [
        Line(
            f"{row['samples']} tokens of {row['what'].removeprefix('far_tokens_')} that need far "
            f"context, {row['context']:,} tokens, budget {setting_of(row)}",
            f"{row['value']:+.3f} nats lost [{row['low']:+.3f}, {row['high']:+.3f}]",
            "fidelity",
            subject=row["what"],
        )
        for row in rows_of(results, "fidelity")
        if row.get("distance") == ALL and row["value"] is not None
    ]


def needle_lines(results: Results) -> list[Line]:
    """Return the share of needles that lists hold at the least budget, and others' best."""
    rows = rows_of(results, "quality_needles")
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        least = min(row["budget"] for row in rows if row["text"] == text)
        own = [row for row in rows if (row["text"], row["budget"]) == (text, least)]
        shares = {
            method: needle_share([row for row in own if row["method"] == method])
            for method in dict.fromkeys(row["method"] for row in own)
        }
        others = {
            method: share
            for method, share in shares.items()
            if share is not None and method != "served" and not method.endswith("oracle")
        }
        if shares.get("served") is None or not others:
            continue
        best = max(others, key=lambda method: others[method])
        lines.append(
            Line(
                f"far keys that single queries look for, held by lists of {percent(least)} of "
                f"{own[0]['context']:,} tokens of {text}",
                f"**{about(shares['served'] or 0.0)}**; the best of other methods, {best}, "
                f"{about(others[best])}; PBS-Attn {about(others.get('pbs', 0.0))}",
                "quality_needles",
                subject=text,
            )
        )
    return lines


def setting_of(row: Row) -> str:
    """Return the budget of a row and the label of the server's settings."""
    return f"{row['budget']:g}" + (f" ({row['setting']})" if row.get("setting") else "")


def attention_lines(results: Results) -> list[Line]:
    """Return a line a context: of real heads, or else of random numbers."""
    rows = rows_of(results, "attention")
    return real_lines(rows) or random_lines(rows, results)


def real_lines(rows: Sequence[Row]) -> list[Line]:
    """Return the served setting of every context; where it was not timed, every budget.

    Errors are those of the very tensors that were timed.
    """
    served = S2OConfig()
    contexts: dict[int, list[Row]] = {}
    for row in rows:
        if inputs_of(row) == REAL and (row["shape"], row["ranking"]) == (SHAPE, served.ranking):
            contexts.setdefault(row["context"], []).append(row)
    lines = []
    for context, own in sorted(contexts.items(), reverse=True):
        asked = (served.sparsity_budget, served.min_budget_tokens)
        of_default = [row for row in own if asked_of(row) == asked]
        for row in sorted(of_default or own, key=lambda row: row["total_ms"]):
            dropped = row.get("dropped_mass")
            least = asked_of(row)[1]
            lines.append(
                Line(
                    f"attention of {context:,} tokens, heads of {row['model']} on {row['text']} "
                    f"(budget {row['budget']:g}"
                    + (f", at least {least:,} tokens" if least else "")
                    + "), ranking included",
                    f"{against_dense(row)}; error of the same tensors {row['relative_mse']:.4f}, "
                    f"worst layer {row['relative_mse_worst_layer']:.4f}, worst hundredth of rows "
                    f"{row['row_error_p99']:.2f}"
                    + ("" if dropped is None else f", dropped mass {dropped:.3f}"),
                    "attention",
                )
            )
    return lines


def asked_of(row: Row) -> tuple[float, int]:
    """Return the budget of a row of attention.json and the least tokens a query may visit."""
    return row["budget"], row.get("min_budget_tokens", 0)


def against_dense(row: Row) -> str:
    """Return a time of attention.json and how many times longer dense attention takes."""
    return (
        f"{row['total_ms']:.1f} ms: **{times(row['fa3_paged_ms'] / row['total_ms'])}** faster "
        f"than paged FlashAttention 3, **{times(row['fa2_ms'] / row['total_ms'])}** than 2"
    )


def random_lines(rows: Sequence[Row], results: Results) -> list[Line]:
    """Return the fastest setting of every context whose error, of quality.json, is small."""
    known = errors(measured(results, RANKINGS["low_rank"]))
    best: dict[int, Row] = {}
    for row in rows:
        key = (row["context"], row["budget"])
        if (
            (row["shape"], row["ranking"], row["kv_dtype"]) == (SHAPE, "low_rank", "bf16")
            and inputs_of(row) == RANDOM
            and known.get(key, 1.0) <= FEW_ERRORS
            and row["total_ms"] < best.get(row["context"], {"total_ms": float("inf")})["total_ms"]
        ):
            best[row["context"]] = row
    return [
        Line(
            f"attention of {context:,} tokens, ranking low_rank, at an error of "
            f"{known[context, row['budget']]:.4f} (budget {row['budget']:g}), ranking included",
            against_dense(row),
            "attention",
        )
        for context, row in sorted(best.items(), reverse=True)
    ]


def quality_lines(results: Results) -> list[Line]:
    """Return the error beside PBS-Attn's, RULER's means and perplexities."""
    served = measured(results, RANKINGS["low_rank"])
    ours, theirs = errors(served), errors(measured(results, "pbs"))
    commits = {(row["context"], row["budget"]): str(row.get("commit", "")) for row in served}
    contexts = sorted({c for c, budget in ours if budget == AT and (c, AT) in theirs})[::-1]
    lines = [
        Line(
            f"error of low_rank at {percent(AT)} of {context:,} tokens",
            f"{ours[context, AT]:.4f}, **{times(theirs[context, AT] / ours[context, AT])}** less "
            f"than PBS-Attn's {theirs[context, AT]:.4f}",
            "quality",
            commits[context, AT],
        )
        for context in contexts[:2]
    ]
    for row in rows_of(results, "ruler"):
        if row["task"] != "mean" or row.get("question", "end") != "end" or row.get("setting"):
            continue  # other questions and settings stand in QUALITY.md
        if row["difference"] is not None:
            change = tuple(row[f"difference{end}"] for end in ("", "_low", "_high"))
            lines.append(
                Line(
                    f"RULER of low_rank, {row['context']:,} tokens, budget {row['budget']:g}, "
                    "against dense",
                    "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*change),
                    "ruler",
                )
            )
    for row in rows_of(results, "perplexity"):
        if row["difference"] is not None:
            values = (row["perplexity"], row["difference"])
            lines.append(
                Line(
                    f"perplexity with low_rank of {row['context']:,} tokens, budget "
                    f"{row['budget']:g}",
                    "{:.2f}, {:+.4f} nats from dense".format(*values),
                    "perplexity",
                )
            )
    return lines


def served_lines(results: Results) -> list[Line]:
    """Return what S2O leaves alone, sparse decode, and the mixed run."""
    lines: list[Line] = []
    rows = rows_of(results, "decode")
    if rows:
        ratios = [row["s2o"] / row["stock"] for row in rows]
        lines.append(
            Line(
                "decode, and prompts too short for it, against stock",
                f"{min(ratios):.3f} to {max(ratios):.3f} of its time",
                "decode",
            )
        )
    lines += [
        Line(
            f"a token of {row['batch']} x {row['context']:,} with a decode budget of "
            f"{row['decode_budget']:g}, {row['layers']} layers",
            f"{row['s2o']:.2f} ms for stock's {row['stock']:.2f}: **{row['ratio']:.2f}x** "
            f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            "decode_sparse",
        )
        for row in rows_of(results, "decode_sparse")
        if row["density"] is not None
    ]
    result = results.get("serve")
    if result:
        one = result["summary"]
        late = one["kernels"]["end"] - one["kernels"]["ready"]
        lines.append(
            Line(
                f"{one['requests']} mixed requests of up to {one['max_context']:,} tokens",
                f"{one['failed']} failed, {late} kernels compiled late",
                "serve",
            )
        )
    return lines
