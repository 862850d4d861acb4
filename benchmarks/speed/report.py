"""``s2o bench report``: benchmarks/SPEED.md and the tables of results, from the result files.

The tables are the short one of README and the whole one of docs/benchmarks.md: what lies between
two marks, left alone where these are not. What has no file is "not measured", and every number
stands in a result file.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from s2o_vllm.loadtest.replay.plot import arm_name, load_name

from ..quality.report import RANKINGS, source
from ..quality.samples import EvalError, Row
from ..quality.tables import Result, number, read_result, table
from ..result_file import RANDOM, REAL, inputs_of
from .headline import (
    MODEL,
    SHAPE,
    TEXT,
    Results,
    about,
    errors,
    headline,
    measured,
    percent,
    rows_of,
    times,
)
from .serving import LLAMA_8B

BEGIN, END = "<!-- s2o bench report: begin -->", "<!-- s2o bench report: end -->"
NAMES = (
    "attention", "attention_shapes", "ttft", "profile", "decode",
    "decode_budget", "decode_sparse", "serve", "load", "replay", "replay_mixed",
    "quality", "ruler", "ruler_h200",
    "fidelity", "perplexity", "quality_needles",
)  # fmt: skip
LAYERS = {"Llama-3.1-8B shape": (SHAPE, LLAMA_8B["num_hidden_layers"])}
NEAR = 0.01  # contexts that differ by less are one: tokens of an answer need room


TIMES = (
    "rank, ms", "attend, ms", "total, ms", "over FA3", "over FA2", "attend over FA3",
    "all visited, of FA3's rate", "idle early stop",
)  # fmt: skip


def attention_times(row: Row) -> list[str]:
    """Return the cells of one row's times; see ``TIMES``."""
    total = row["total_ms"]
    return [
        number(row["rank_ms"], 2), number(row["attend_ms"], 2),
        number(total, 2), times(row["fa3_paged_ms"] / total),
        times(row["fa2_ms"] / total) if row.get("fa2_ms") else "-",
        times(row["fa3_paged_ms"] / row["attend_ms"]),
        about(row["fa3_paged_ms"] / row["dense_mode_ms"]),
        about(row["early_stop_overhead"]),
    ]  # fmt: skip


def budget_of(row: Row) -> str:
    """Return the budget of a row of attention.json, and the least tokens that a query visits."""
    least = row.get("min_budget_tokens", 0)
    return percent(row["budget"]) + (f" (at least {least:,})" if least else "")


def attention_table(rows: Iterable[Row], known: Mapping[str, Mapping[tuple, float]]) -> str:
    """Return times of one layer's attention to random numbers, a table a shape."""
    shapes: dict[str, list[list[str]]] = {}
    for row in rows:
        error = known.get(row["ranking"], {}).get((row["context"], row["budget"]))
        if row.get("min_budget_tokens"):
            error = None  # quality.json knows shares alone
        setting = (
            f"{row['context']:,}, `{row['ranking']}`, {row.get('kv_dtype', 'bf16')}, "
            f"{budget_of(row)}"
        )
        line = [setting, number(error, 4), *attention_times(row)]
        shapes.setdefault(row["shape"], []).append(line)
    head = ["tokens, ranking, cache, budget", "error", *TIMES]
    return "\n\n".join(f"{shape}:\n\n{table(head, lines)}" for shape, lines in shapes.items())


def real_table(rows: Iterable[Row]) -> str:
    """Return times and errors of one layer's attention to real heads, a table a shape and model."""
    titles: dict[str, list[list[str]]] = {}
    for row in rows:
        title = (
            f"{row['shape']}, real heads of {row['model']} on {row['text']}, errors of the same "
            "tensors"
        )
        line = [
            f"{row['context']:,}, `{row['ranking']}`, {budget_of(row)}",
            number(row["relative_mse"], 4), number(row["relative_mse_worst_layer"], 4),
            number(row["row_error_p99"], 3), number(row.get("dropped_mass"), 3),
            *attention_times(row),
        ]  # fmt: skip
        titles.setdefault(title, []).append(line)
    head = [
        "tokens, ranking, budget", "error", "worst layer", "worst hundredth of rows",
        "dropped mass", *TIMES,
    ]  # fmt: skip
    return "\n\n".join(f"{title}:\n\n{table(head, lines)}" for title, lines in titles.items())


def ttft_table(rows: Sequence[Row]) -> str:
    """Return times to first token, a line a context."""
    arms = list(dict.fromkeys((row["backend"], row["budget"]) for row in rows))
    lines = []
    for context in dict.fromkeys(row["context"] for row in rows):
        own = {(r["backend"], r["budget"]): r["ttft_s"] for r in rows if r["context"] == context}
        stock = own.get(("stock", 1.0))
        line = [f"{context:,}"]
        for arm in arms:
            line.append(number(own.get(arm), 3))
            if arm[0] != "stock":
                line.append(f"{stock / own[arm]:.2f}x" if stock and arm in own else "-")
        lines.append(line)
    head = ["tokens"]
    for backend, budget in arms:
        head += ["stock, s"] if backend == "stock" else [f"budget {budget:g}, s", "sooner"]
    return table(head, lines)


def attention_seconds(row: Row, attention: Result | None, name: str) -> float | None:
    """Return what one kernel takes of a server's prompt, None where that card did not measure it.

    Args:
        row: of ttft.json.
        attention: attention.json of the same card; one prompt, one layer.
        name: of the kernel's time there. Attention is quadratic: a context nearby stands for it.
    """
    shape, layers = LAYERS.get(row["model"], ("", 0))
    rows = attention["rows"] if attention else []
    # These servers' weights are random: so are their heads, if both were measured.
    for one in sorted(rows, key=lambda one: inputs_of(one) != RANDOM):
        ratio = row["context"] / one["context"]
        if one["shape"] == shape and one["kv_dtype"] == "bf16" and abs(ratio - 1) < NEAR:
            return float(layers * one[name] * ratio**2 / 1000)
    return None


def bounds_table(rows: Sequence[Row], attention: Result | None) -> str:
    """Return how far attention that costs nothing would go, and the paper's baseline."""
    stocks = {row["context"]: row for row in rows if row["backend"] == "stock"}
    lines = []
    for row in rows:
        stock = stocks.get(row["context"], row)
        if stock is row:
            continue
        fa3 = attention_seconds(stock, attention, "fa3_paged_ms")
        fa2 = attention_seconds(stock, attention, "fa2_ms")
        if fa3 is None or fa2 is None:
            continue
        free = stock["ttft_s"] - fa3
        most, sooner = stock["ttft_s"] / free, stock["ttft_s"] / row["ttft_s"]
        lines.append([
            f"{row['context']:,}, budget {row['budget']:g}", number(fa3, 3), f"{most:.2f}x",
            f"{sooner:.2f}x", about(sooner / most), number(free + fa2, 3),
            f"{(free + fa2) / row['ttft_s']:.2f}x",
        ])  # fmt: skip
    head = [
        "tokens", "stock's attention, s", "sooner without it", "S2O sooner", "share of that",
        "with FlashAttention 2, s", "S2O sooner than that",
    ]  # fmt: skip
    return table(head, lines) if lines else ""


def compared_table(rows: Sequence[Row]) -> str:
    """Return pairwise comparisons with stock vLLM."""
    lines = [
        [
            {"tpot_ms": "a token", "ttft_s": "the first token"}[row["what"]]
            + f", {row['batch']} x {row['context']:,} tokens"
            + (f", {row['layers']} layers, decode budget {row['decode_budget']:g}"
               if "decode_budget" in row else ""),
            {"tpot_ms": "ms", "ttft_s": "s"}[row["what"]],
            number(row["stock"], 3), number(row["s2o"], 3),
            f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "unit", "stock", "S2O", "stock over S2O"], lines)


def operator_table(rows: Sequence[Row]) -> str:
    """Return times of sparse decode in one layer."""
    lines = [
        [
            f"{row['batch']} x {row['context']:,}, {percent(row['budget'])}",
            number(row["fa3_paged_ms"], 3), number(row["operator_ms"], 3),
            f"{row['gain']:.2f}x", number(row["kv_bytes_ms"], 3), number(row["image_bytes_ms"], 3),
        ]
        for row in rows
    ]  # fmt: skip
    head = [
        "requests x tokens, budget", "FA3, ms", "S2O, ms", "faster",
        "all keys and values copied, ms", "all projected keys copied, ms",
    ]  # fmt: skip
    return table(head, lines)


def profile_table(rows: Sequence[Row]) -> str:
    """Return the parts of a long prompt's time on the GPU."""
    arms = list(dict.fromkeys((row["backend"], row["budget"], row["context"]) for row in rows))
    found = {(r["part"], (r["backend"], r["budget"], r["context"])): r for r in rows}
    lines = [
        [
            part,
            *(
                f"{found[part, arm]['ms']:.0f} ms, {about(found[part, arm]['share'])}"
                if (part, arm) in found
                else "-"
                for arm in arms
            ),
        ]
        for part in dict.fromkeys(row["part"] for row in rows)
    ]
    return table(["part", *(f"{b}, budget {n:g}, {c:,} tokens" for b, n, c in arms)], lines)


def serve_table(result: Result) -> str:
    """Return what the mixed run came to."""
    one = result["summary"]
    memory, kernels = one["gpu_memory_mib"], one["kernels"]
    lines = [
        ["requests, at a time", f"{one['requests']}, {one['concurrency']}"],
        ["answered, given up by the client, failed, left running",
         f"{one['answered']}, {one['aborted']}, {one['failed']}, {one['left_running']}"],
        ["prompt tokens a second, cached ones included", f"{one['prompt_tok_s']:,.0f}"],
        ["prefix tokens that were there to share, shared",
         f"{one['shared_tokens']:,}, {one['cached_tokens']:,}"],
        ["density", number(one["density"], 3)],
        ["preemptions", str(one["preemptions"])],
        ["GPU memory after warm-up, at the end, MiB", f"{memory['warm']:,}, {memory['end']:,}"],
        ["kernels compiled after the server was ready", str(kernels["end"] - kernels["ready"])],
    ]  # fmt: skip
    return table(["", ""], lines)


LOAD = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


def load_table(rows: Sequence[Row]) -> str:
    """Return what a load test saw."""
    lines = [
        [
            f"{row['backend']}, budget {row['budget']:g}, {row['context']:,} tokens, "
            f"{row['rate']:g} a second",
            *(number(row[f"{what}_ms"], 0) for what in LOAD),
            str(row["failed"]),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "TTFT p50, ms", "p99", "ITL p50, ms", "p99", "failed"], lines)


def replay_table(rows: Sequence[Row]) -> str:
    """Return what a replay of conversations saw."""
    lines = [
        [
            f"{row['model']}, {row['trace']} up to {row['context']:,} tokens, {load_name(row)}",
            arm_name(row), number(row["ttft_p50_ms"], 0), number(row["ttft_p99_ms"], 0),
            number(row["short_ttft_p99_ms"], 0), number(row["itl_p99_ms"], 0),
            number(row["answered_rps"], 2), number(row["goodput_rps"], 2), str(row["objective"]),
            number(row["prefix_hit_share"], 2), str(row["failed"]),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["", "arm", "TTFT p50, ms", "p99", "short prompts' p99", "ITL p99, ms", "requests/s",
            "goodput/s", "objective, ms", "prefix hits", "failed"]  # fmt: skip
    return table(head, lines)


SECTIONS: tuple[tuple[str, str, str, str], ...] = (
    ("attention", "Attention of one layer", "s2o bench attention",
     "One prompt, causal, ranking included, against dense attention of the same run. The error is "
     f"that of quality.json at the same context and budget ({MODEL}, {TEXT})."),
    ("attention_shapes", "Other contexts", "s2o bench attention --contexts ...", ""),
    ("ttft", "Time to first token", "s2o bench ttft",
     "`vllm serve`, both servers on one card, one prompt at a time, random weights. The second "
     "table says what there is to gain: stock's time without its attention, as the card's "
     "attention.json has it, and with FlashAttention 2 instead, the paper's baseline."),
    ("profile", "Where a long prompt's time goes", "s2o bench profile", ""),
    ("decode", "What S2O leaves alone", "s2o bench decode",
     "Decode and prompts below `min_context`, pair by pair of the same prompts; 95 % intervals."),
    ("decode_budget", "Sparse decode, one layer",
     "python -m s2o_vllm.benchmarks.speed.decode_budget", ""),
    ("decode_sparse", "Sparse decode, served",
     "python -m s2o_vllm.benchmarks.speed.decode_sparse", ""),
    ("serve", "A mixed run", "s2o bench serve", ""),
    ("load", "A load test", "s2o loadtest", ""),
    ("replay", "Conversations", "s2o bench replay",
     "Turns that share prefixes, both arms in turn; goodput counts requests within the objective."),
    ("replay_mixed", "Short and long prompts together", "make bench-replay", ""),
)  # fmt: skip


def body(name: str, results: Results) -> str:
    """Return a section's table; empty where nothing was measured."""
    result, rows = results.get(name), rows_of(results, name)
    if result is None or not rows:
        return ""
    if name.startswith("attention"):
        known = {ranking: errors(measured(results, spec)) for ranking, spec in RANKINGS.items()}
        real = [row for row in rows if inputs_of(row) == REAL]
        random = [row for row in rows if inputs_of(row) == RANDOM]
        return "\n\n".join(filter(None, [real_table(real), attention_table(random, known)]))
    if name == "serve":
        return serve_table(result)
    if name == "ttft":
        parts = [ttft_table(rows), bounds_table(rows, results.get("attention"))]
        return "\n\n".join(filter(None, parts))
    makers: dict[str, Callable[[Sequence[Row]], str]] = {
        "profile": profile_table, "decode": compared_table, "decode_sparse": compared_table,
        "decode_budget": operator_table, "load": load_table, "replay": replay_table,
        "replay_mixed": replay_table,
    }  # fmt: skip
    return makers[name](rows)


def report(results: Results) -> str:
    """Return SPEED.md."""
    parts = [
        "# Speed",
        "Written by `s2o bench report` from the files in `benchmarks/results`; do not edit. What a "
        "figure costs in accuracy: `QUALITY.md`. What was missed, and why: `quality/LOG.md`.",
    ]
    for name, title, command, text in SECTIONS:
        made = body(name, results)
        parts.append(f"## {title}")
        if made:
            parts += [part for part in (text, made) if part]
            parts.append(f"`{command}`. {source(name, results[name])}")
        else:
            parts.append(f"Not measured: `{command}` makes `{name}.json`.")
    return "\n\n".join(parts) + "\n"


def renewed(text: str, made: str) -> str:
    """Return a page with its table of results replaced, if it has the marks of one."""
    if BEGIN not in text or END not in text:
        return text
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, also where nothing was measured; 2 when a file is no result file.
    """
    parser = argparse.ArgumentParser(
        prog="s2o bench report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="folder of result files (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("benchmarks/SPEED.md"), metavar="FILE",
        help="default: %(default)s")  # fmt: skip
    add("--readme", type=Path, default=Path("README.md"), metavar="FILE",
        help="whose short table is renewed (default: %(default)s)")  # fmt: skip
    add("--page", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE",
        help="whose whole table is renewed (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if not args.results.is_dir():
            raise EvalError(f"--results is {args.results}, must be a folder")
        results = {name: read_result(args.results / f"{name}.json") for name in NAMES}
    except EvalError as error:
        print(f"s2o bench report: {error}", file=sys.stderr)
        return 2
    args.out.write_text(report(results), encoding="utf-8")
    tables = {
        args.readme: headline(results, short=True),
        args.page: headline(results, root="../"),
    }
    for page, made in tables.items():
        if page.exists():
            text = page.read_text(encoding="utf-8")
            page.write_text(renewed(text, made), encoding="utf-8")
    missing = [f"{name}.json" for name, result in results.items() if result is None]
    print(f"report: {args.out}" + (f" (not measured: {', '.join(missing)})" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
