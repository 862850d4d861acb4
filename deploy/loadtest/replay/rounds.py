"""One round: sessions of a trace on one server, and how long that will take."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .client import Answer
from .log import Record
from .tokens import Tokens
from .traces import Session, work

MOST_AT_ONCE = 1024  # sessions without a limit of concurrency
Send = Callable[[Sequence[int], int], Answer]  # asks a prompt for a number of tokens


@dataclass(frozen=True)
class Load:
    """How sessions arrive.

    Attributes:
        rate: sessions that begin each second (Poisson); None for the trace's own times, or for
            one after the other.
        concurrency: most sessions at once; None without a limit.
    """

    rate: float | None
    concurrency: int | None


@dataclass(frozen=True)
class Speed:
    """What one request alone takes on a server: seconds per prompt token and per answered one."""

    prefill_s: float
    decode_s: float


def send_round(
    sessions: Sequence[Session],
    load: Load,
    send: Send,
    tokens: Tokens,
    done: Callable[[], None],
) -> tuple[list[Record], float]:
    """Replay sessions on one server; return their requests and the seconds from first to last.

    Args:
        sessions: of a round, with starting times where the load has them.
        load: how they arrive.
        send: asks a prompt for a number of tokens and returns an `Answer`.
        tokens: of pieces.
        done: called after each request, those that were not sent included.
    """
    stopped = threading.Event()

    def one(session: Session) -> list[Record]:
        history: list[int] = []
        requests: list[Record] = []
        failed: str | None = None
        for number, turn in enumerate(session.turns, session.first_turn):
            for piece in turn.pieces:
                history += tokens.of(piece)
            if failed is None and not stopped.is_set():
                stopped.wait(turn.think_s)
                answer = send(history, turn.output_tokens)
                failed = answer.error
                requests.append(_record(session, number, len(history), turn.new_tokens, answer))
                history += answer.tokens
            else:
                failed = failed or "not sent: the replay was interrupted"
                requests.append(_unsent(session, number, len(history), turn.new_tokens, failed))
            done()
        return requests

    begun = time.perf_counter()
    workers = load.concurrency or min(len(sessions), MOST_AT_ONCE)
    pool = ThreadPoolExecutor(workers)
    try:
        futures = []
        for session in sorted(sessions, key=lambda one: one.start_s or 0.0):
            if session.start_s is not None:
                time.sleep(max(0.0, begun + session.start_s - time.perf_counter()))
            futures.append(pool.submit(one, session))
        requests = [request for future in futures for request in future.result()]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    return requests, time.perf_counter() - begun


def _record(session: Session, turn: int, prompt: int, new: int, answer: Answer) -> Record:
    tpot = answer.tpot_s
    return {
        "session": session.name,
        "turn": turn,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "output_tokens": len(answer.tokens),
        "ttft_ms": None if answer.ttft_s is None else round(1000 * answer.ttft_s, 3),
        "tpot_ms": None if tpot is None else round(1000 * tpot, 3),
        "e2e_ms": round(1000 * (answer.end_s - answer.sent_s), 3),
        "gaps_ms": [round(1000 * gap, 2) for gap in answer.gaps_s],
        "error": answer.error,
    }


def _unsent(session: Session, turn: int, prompt: int, new: int, error: str) -> Record:
    return {
        "session": session.name, "turn": turn, "prompt_tokens": prompt, "new_tokens": new,
        "output_tokens": 0, "ttft_ms": None, "tpot_ms": None, "e2e_ms": 0.0, "gaps_ms": [],
        "error": f"after an earlier turn: {error}",
    }  # fmt: skip


def seconds_of(sessions: Sequence[Session], load: Load, speed: Speed) -> float:
    """Estimate how long a round takes on one arm.

    The server prefills what no prefix brings, one prompt at a time; answers and pauses of
    sessions that run at once pass together. Prefill counts at the speed of the longest prompt.
    """
    new, output = work(sessions)
    waiting = output * speed.decode_s
    waiting += sum(turn.think_s for session in sessions for turn in session.turns)
    at_once = min(len(sessions), load.concurrency or len(sessions))
    last = max(session.start_s or 0.0 for session in sessions)
    return max(last, new * speed.prefill_s) + waiting / at_once
