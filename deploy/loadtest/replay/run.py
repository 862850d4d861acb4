"""Replay a trace on every arm, round by round in turn."""

import argparse
import hashlib
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from s2o_vllm.benchmarks.result_file import save

from ..arms import Arm, LoadTestError
from ..report import add_row, header, load_rows
from ..server import (
    SETTLE,
    Server,
    check_budget_is_honoured,
    check_reachable,
    history_counters,
    inspect,
    prefix_counters,
)
from . import plot, report
from .client import ask
from .files import read_trace
from .log import Log, Record
from .rounds import Load, Speed, seconds_of, send_round
from .tokens import Tokenizer, Tokens, prepare, say_stand_in
from .traces import GENERATED, Piece, Session, Shape, generate, rounds, starts

UNFINISHED = 3  # exit code: `--minutes` were over
PROBE_TOKENS = 16  # of the answer by which a server's speed is found


def replay(args: argparse.Namespace, arms: Sequence[Arm]) -> int:
    """Run the replay of a command line; return the command's exit code.

    Raises:
        LoadTestError: if a server cannot be reached or an argument cannot work.
    """
    objectives = report.parse_objectives(args.goodput)
    servers = {arm: inspect(arm, args.model) for arm in arms}
    for arm, server in servers.items():
        check_budget_is_honoured(arm, server)
    first = next(iter(servers))
    sessions, tokens = _trace(args, Tokenizer(first, servers[first]))
    longest = max(session.longest for session in sessions)
    for arm, server in servers.items():
        if server.max_model_len is not None and longest > server.max_model_len:
            raise LoadTestError(
                f"{arm.name}: the trace's longest prompt and answer are {longest} tokens, must be "
                f"at most the server's {server.max_model_len}"
            )
    loads = _loads(args, sessions)
    head = header(list(servers.values()), args.device)
    log = Log(args.output.with_suffix(".requests.jsonl"), _plan(args, servers, sessions, loads))
    rows = load_rows(args.output, head) if args.append or args.resume else []
    if args.resume:
        log.resume()
    else:
        log.begin()
    run = Run(args, servers, loads, tokens, log, objectives, longest, uuid.uuid4().hex)
    speeds = run.probe()
    return run.finish(head, rows, sessions, speeds)


def _trace(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[Session], Tokens]:
    say_stand_in(tokenizer)
    if args.replay in GENERATED:
        shape = Shape(
            args.sessions or 8, args.lengths, args.turns, args.new_tokens, args.shared_tokens,
            args.output_tokens, args.think, args.seed,
        )  # fmt: skip
        sessions = generate(args.replay, shape)
    else:
        sessions = read_trace(Path(args.replay), args.output_tokens, args.sessions)
    return prepare(sessions, tokenizer, args.text, args.seed)


def _loads(args: argparse.Namespace, sessions: Sequence[Session]) -> list[Load]:
    levels: list[int] = args.concurrency or []
    if args.rates:
        if len(levels) > 1:
            raise LoadTestError("--concurrency has several values, must have one beside --rates")
        return [Load(rate, levels[0] if levels else None) for rate in args.rates]
    if levels:
        return [Load(None, level) for level in levels]
    timed = all(session.start_s is not None for session in sessions)
    return [Load(None, None if timed else 4)]


def _plan(
    args: argparse.Namespace,
    servers: Mapping[Arm, Server],
    sessions: Sequence[Session],
    loads: Sequence[Load],
) -> Record:
    """Return what must be the same to go on with a replay."""
    digest = hashlib.sha256(repr(sessions).encode()).hexdigest()[:16]
    return {
        "trace": args.replay,
        "sessions": digest,
        "seed": args.seed,
        "rounds": args.rounds,
        "loads": [asdict(load) for load in loads],
        "arms": [[arm.name, arm.budget, server.model] for arm, server in servers.items()],
    }


class Run:
    """A replay that runs: its arms, loads and what was measured so far."""

    def __init__(
        self,
        args: argparse.Namespace,
        servers: Mapping[Arm, Server],
        loads: Sequence[Load],
        tokens: Tokens,
        log: Log,
        objectives: Mapping[str, float],
        longest: int,
        salt: str,
    ):
        self.args, self.servers, self.loads = args, servers, loads
        self.tokens, self.log, self.objectives = tokens, log, objectives
        self.longest, self.salt = longest, salt

    def probe(self) -> dict[Arm, Speed]:
        """Ask each server alone, for as long a prompt as there is; not measured.

        Raises:
            LoadTestError: if a server does not answer.
        """
        speeds = {}
        for number, (arm, server) in enumerate(self.servers.items()):
            count = min(PROBE_TOKENS, max(1, self.longest - 1))
            prompt = self._probe_prompt(self.longest - count)
            for attempt in ("warm-up", "probe"):
                salt = f"{self.salt}-{number}-{attempt}"
                answer = ask(arm, server.model, prompt, count, salt)
                if answer.error is not None or answer.ttft_s is None:
                    raise LoadTestError(f"{arm.name}: the first request failed: {answer.error}")
                speeds[arm] = Speed(answer.ttft_s / len(prompt), answer.tpot_s or 0.0)
        time.sleep(SETTLE)
        return speeds

    def _probe_prompt(self, count: int) -> list[int]:
        if self.tokens.pool:
            return self.tokens.of(Piece("probe", count))
        ids = [token for text in self.tokens.texts.values() for token in text]
        return (ids * math.ceil(count / len(ids)))[:count]

    def finish(
        self,
        head: Record,
        rows: list[Record],
        sessions: Sequence[Session],
        speeds: Mapping[Arm, Speed],
    ) -> int:
        """Measure all parts that are missing; save rows as they come; return the exit code."""
        from tqdm import tqdm

        plan = [
            (level, number, part)
            for level, load in enumerate(self.loads)
            for number, part in enumerate(self._rounds(sessions, load))
        ]
        missing = [
            (level, number, index, part)
            for level, number, part in plan
            for index in self._order(number)
            if (level, number, index) not in self.log.parts
        ]
        arms = list(self.servers)
        expected = [
            seconds_of(part, self.loads[level], speeds[arms[index]])
            for level, _, index, part in missing
        ]
        requests = sum(len(session.turns) for session in sessions)
        print(
            f"{len(sessions)} sessions, {requests} requests of up to {self.longest:,} tokens; "
            f"{len(arms)} arms, {len(self.loads)} loads: about {sum(expected) / 60:.1f} min left",
            flush=True,
        )
        begun, level_before = time.monotonic(), None
        total = sum(len(session.turns) for *_, part in missing for session in part)
        with tqdm(total=total, unit="request", disable=None, file=sys.stderr) as bar:
            for (level, number, index, part), seconds in zip(missing, expected, strict=True):
                spent = (time.monotonic() - begun + seconds) / 60
                if self.args.minutes is not None and spent > self.args.minutes:
                    print("--minutes are over: go on with --resume", flush=True)
                    return UNFINISHED
                if level != level_before:
                    bar.write(f"{plot.load_name(asdict(self.loads[level]))}:", file=sys.stdout)
                    level_before = level
                bar.set_description(f"{arms[index].name}, round {number + 1}")
                self._measure(level, number, index, part, bar.update)
                rows = self._add_rows(rows, level, len(self._rounds(sessions, self.loads[level])),
                                      len(sessions))  # fmt: skip
                save(self.args.output, head, rows)
        return self._report(head, rows)

    def _order(self, number: int) -> list[int]:
        """Return the arms' order in a round: the last one is the first in the next."""
        order = list(range(len(self.servers)))
        return order if number % 2 == 0 else order[::-1]

    def _rounds(self, sessions: Sequence[Session], load: Load) -> list[list[Session]]:
        timed = list(sessions)
        if load.rate is not None:
            timed = starts(timed, load.rate, self.args.seed)
        elif load.concurrency is not None:
            timed = [replace(session, start_s=None) for session in timed]
        return rounds(timed, self.args.rounds)

    def _measure(
        self, level: int, number: int, index: int, part: Sequence[Session], done: Callable[[], Any]
    ) -> None:
        arm, server = list(self.servers.items())[index]
        check_reachable(arm)
        salt = f"{self.salt}-{level}-{index}"
        before = (prefix_counters(arm) or {}) | (history_counters(arm) or {})

        def send(prompt: Sequence[int], output_tokens: int) -> Any:
            return ask(arm, server.model, prompt, output_tokens, salt)

        requests, seconds = send_round(part, self.loads[level], send, self.tokens, done)
        time.sleep(SETTLE)
        after = (prefix_counters(arm) or {}) | (history_counters(arm) or {})
        grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
        self.log.add({
            "load": level, "round": number, "arm": index, "seconds": round(seconds, 3),
            "prefix_hits": grown.get("hits"), "prefix_queries": grown.get("queries"),
            "visited": grown.get("visited"), "eligible": grown.get("eligible"),
            "requests": requests,
        })  # fmt: skip

    def _add_rows(self, rows: list[Record], level: int, count: int, sessions: int) -> list[Record]:
        """Return the rows with those of a load, once every arm has measured all its rounds."""
        arms = list(self.servers.items())
        keys = [[(level, number, index) for number in range(count)] for index in range(len(arms))]
        if not all(key in self.log.parts for own in keys for key in own):
            return rows
        for (arm, server), own in zip(arms, keys, strict=True):
            row = report.row(
                {
                    "model": server.name,
                    "trace": self.trace,
                    "backend": arm.name,
                    "budget": arm.budget,
                    **asdict(self.loads[level]),
                    "context": self.longest,
                    "sessions": sessions,
                },
                [self.log.parts[key] for key in own],
                self.objectives,
            )
            rows = add_row(rows, row)
            print(report.line(row), flush=True)
        return rows

    @property
    def trace(self) -> str:
        """The trace's name in rows."""
        name = str(self.args.replay)
        return name if name in GENERATED else Path(name).stem

    def _report(self, head: Record, rows: Sequence[Record]) -> int:
        own = [row for row in rows if row.get("trace") == self.trace]
        table = self.args.output.with_suffix(".csv")
        report.write_csv(table, own)
        print(f"rows: {self.args.output}, {table}; requests: {self.log.path}")
        try:
            picture = self.args.plot or self.args.output.with_suffix(".png")
            plot.draw(json.loads(self.args.output.read_text()), own, picture)
            print(f"picture: {picture}")
        except ImportError:
            print("no picture: matplotlib is not installed (pip install 's2o-vllm[bench]')")
        return 0 if any(row["requests"] > row["failed"] for row in own) else 1
