"""Conversations to replay: turns, what each one adds, and when it is sent."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

GENERATED = ("agent", "mixed")
SHORT_LENGTHS = (256, 2048)  # tokens of a short prompt of `mixed`
SHORT_PER_LONG = 4  # short prompts of `mixed` for each long one
LATEST_START = 0.75  # of the longest context: where an agent's first turn ends at most
OUTPUT_SPREAD = 2.0  # answers are between 1/2 and 2 times the length asked for


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        key: pieces of one key are the same tokens.
        tokens: their number; of text it is counted by the server's tokenizer, and 0 before.
        text: what it says; without it tokens are drawn from the text that replays use.
    """

    key: str
    tokens: int
    text: str | None = None


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        pieces: what it adds to the conversation.
        output_tokens: length of the answer.
        think_s: seconds between the answer before and this question.
    """

    pieces: tuple[Piece, ...]
    output_tokens: int
    think_s: float = 0.0

    @property
    def new_tokens(self) -> int:
        """Tokens of the question."""
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class Session:
    """A conversation: each turn is sent after the answer of the one before.

    Attributes:
        name: unique in its trace.
        turns: in order.
        start_s: when it begins, in seconds from the trace's begin; None where no one says.
        first_turn: number of its first turn. A trace of single requests has sessions of one turn
            that begin with an earlier request's prompt.
    """

    name: str
    turns: tuple[Turn, ...]
    start_s: float | None = None
    first_turn: int = 1

    def lengths(self) -> Iterator[tuple[int, Turn]]:
        """Yield each turn with the tokens of its whole prompt."""
        history = 0
        for turn in self.turns:
            history += turn.new_tokens
            yield history, turn
            history += turn.output_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(length + turn.output_tokens for length, turn in self.lengths())


@dataclass(frozen=True)
class Shape:
    """What generated conversations look like; lengths are in tokens.

    Attributes:
        sessions: their number.
        lengths: shortest and longest prompt, answers included.
        turns: most turns of a session.
        new_tokens: shortest and longest addition of a turn after the first.
        shared_tokens: of a beginning that all sessions share, such as a system prompt and tools.
        output_tokens: of an answer, in the middle.
        think_s: mean seconds before a turn: a tool runs, or a reader reads.
        seed: of all draws.
    """

    sessions: int
    lengths: tuple[int, int]
    turns: int
    new_tokens: tuple[int, int]
    shared_tokens: int
    output_tokens: int
    think_s: float
    seed: int


def generate(name: str, shape: Shape) -> list[Session]:
    """Return the sessions of a generated trace, the same for a shape.

    - ``agent``: all sessions share a beginning, each has a history of its own length (log-uniform)
      and grows by tools' answers of log-uniform length, with short answers of the model between.
    - ``mixed``: requests of one turn; four short ones for each long one.
    """
    make = {"agent": _agent, "mixed": _mixed}[name]
    return [make(number, shape) for number in range(shape.sessions)]


def _agent(number: int, shape: Shape) -> Session:
    draw = random.Random(f"agent {shape.seed} {number}")
    low, high = shape.lengths
    start = _log_uniform(draw, low, max(low, int(high * LATEST_START)))
    shared = min(shape.shared_tokens, start - 1)
    history = Piece(f"{number} history", start - shared)
    pieces = (Piece("shared", shared), history) if shared else (history,)
    turns = [Turn(pieces, _answer(draw, shape))]
    total = start + turns[0].output_tokens
    while len(turns) < shape.turns:
        new = _log_uniform(draw, *shape.new_tokens)
        turn = Turn(
            (Piece(f"{number} turn {len(turns)}", new),),
            _answer(draw, shape),
            draw.expovariate(1 / shape.think_s) if shape.think_s else 0.0,
        )
        total += new + turn.output_tokens
        if total > high:
            break
        turns.append(turn)
    return Session(f"agent-{number}", tuple(turns))


def _mixed(number: int, shape: Shape) -> Session:
    draw = random.Random(f"mixed {shape.seed} {number}")
    is_long = number % (SHORT_PER_LONG + 1) == 0
    new = _log_uniform(draw, *(shape.lengths if is_long else SHORT_LENGTHS))
    output = _answer(draw, shape)
    new = min(new, shape.lengths[1] - output)
    return Session(f"mixed-{number}", (Turn((Piece(f"{number} prompt", new),), output),))


def _log_uniform(draw: random.Random, low: int, high: int) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def _answer(draw: random.Random, shape: Shape) -> int:
    low = max(1, round(shape.output_tokens / OUTPUT_SPREAD))
    return _log_uniform(draw, low, max(low, round(shape.output_tokens * OUTPUT_SPREAD)))


def starts(sessions: Sequence[Session], rate: float, seed: int) -> list[Session]:
    """Return the sessions with Poisson arrivals of ``rate`` a second, the same for a seed."""
    draw = random.Random(f"arrivals {seed}")
    now, timed = 0.0, []
    for session in sessions:
        timed.append(replace(session, start_s=now))
        now += draw.expovariate(rate)
    return timed


def rounds(sessions: Sequence[Session], count: int) -> list[list[Session]]:
    """Split a trace into ``count`` parts of consecutive sessions; clocks of each begin at 0."""
    count = min(count, len(sessions))
    edges = [len(sessions) * part // count for part in range(count + 1)]
    parts = []
    for low, high in pairwise(edges):
        part = list(sessions[low:high])
        first = min((one.start_s for one in part if one.start_s is not None), default=0.0)
        parts.append([
            one if one.start_s is None else replace(one, start_s=one.start_s - first)
            for one in part
        ])  # fmt: skip
    return parts


def work(sessions: Sequence[Session]) -> tuple[int, int]:
    """Return the prompt tokens that no earlier piece brings, and the tokens of all answers."""
    seen: set[str] = set()
    new = output = 0
    for session in sessions:
        for turn in session.turns:
            output += turn.output_tokens
            for piece in turn.pieces:
                new += 0 if piece.key in seen else piece.tokens
                seen.add(piece.key)
    return new, output
