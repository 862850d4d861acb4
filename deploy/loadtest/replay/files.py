"""Traces in files: Mooncake's JSONL, turns of sessions in the same fields, and ShareGPT's format.

| a line has | it is |
|---|---|
| ``hash_ids``, ``input_length`` | a request of Mooncake's: an id is a block of 512 tokens |
| ``session_id`` with ``text_input`` or ``input_length`` | a turn: what it adds to its session |
| ``conversations`` or ``messages`` | a whole conversation, as ShareGPT and OpenAI write it |

Fields of time are Mooncake's: ``timestamp`` and ``delay`` in milliseconds. Lengths are in tokens.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arms import LoadTestError
from .traces import Piece, Session, Turn

BLOCK = 512  # tokens of a block of Mooncake's traces
ASKING = {"human", "user", "system", "tool", "developer"}
CHARACTERS_PER_TOKEN = 4  # of an answer that a conversation records as text
ALLOWED = (
    "must be lines of JSON with hash_ids and input_length, with session_id and text_input or "
    "input_length, or with conversations or messages"
)


def read_trace(path: Path, output_tokens: int, limit: int | None = None) -> list[Session]:
    """Return the sessions of a file.

    Args:
        path: JSONL, or one JSON array.
        output_tokens: of answers whose length the file does not say.
        limit: most sessions; None for all.

    Raises:
        LoadTestError: naming the file, the line and what is allowed.
    """
    sessions: dict[str, _Growing] = {}
    blocks: dict[tuple[Any, ...], int] = {}
    for number, record in enumerate(_records(path), 1):
        try:
            _add(record, number, sessions, blocks, output_tokens)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise LoadTestError(
                f"--replay: record {number} of {path} ({problem}) {ALLOWED}"
            ) from None
    found = [one.session(name) for name, one in sessions.items() if one.turns][:limit]
    if not found:
        raise LoadTestError(f"--replay: {path} holds no turn, {ALLOWED}")
    return found


@dataclass
class _Growing:
    """A session whose turns are still being read."""

    start_s: float | None = None
    first_turn: int = 1
    turns: list[Turn] = field(default_factory=list)

    def session(self, name: str) -> Session:
        return Session(name, tuple(self.turns), self.start_s, self.first_turn)


def _records(path: Path) -> Iterable[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"--replay: {path} cannot be read ({error})") from None
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise LoadTestError(f"--replay: {path} is no JSON ({error}), {ALLOWED}") from None


def _add(
    record: Any,
    number: int,
    sessions: dict[str, _Growing],
    blocks: dict[tuple[Any, ...], int],
    output_tokens: int,
) -> None:
    """Add a record to the sessions that were read so far."""
    if (talk := record.get("conversations") or record.get("messages")) is not None:
        growing = sessions.setdefault(f"{record.get('id', number)}-{number}", _Growing())
        growing.turns.extend(_conversation(talk, number, output_tokens))
        return
    output = _positive(record.get("output_length", output_tokens))
    start_s = record["timestamp"] / 1000 if "timestamp" in record else None
    if "session_id" not in record:
        if "hash_ids" in record:
            pieces = _blocks(record["hash_ids"], _positive(record["input_length"]), number)
            first_turn = _turn_of(record["hash_ids"], blocks)
        else:
            pieces, first_turn = (_piece(record, f"{number}"),), 1
        sessions[f"{number}"] = _Growing(start_s, first_turn, [Turn(pieces, output)])
        return
    name = str(record["session_id"])
    growing = sessions.setdefault(name, _Growing(start_s))
    think_s = record.get("delay", 0) / 1000
    if think_s < 0:
        raise ValueError(f"delay is {record['delay']}, must not be negative")
    piece = _piece(record, f"{name} turn {len(growing.turns)}")
    growing.turns.append(Turn((piece,), output, think_s if growing.turns else 0.0))


def _piece(record: Any, key: str) -> Piece:
    if "text_input" in record:
        return text_piece(str(record["text_input"]))
    return Piece(key, _positive(record["input_length"]))


def text_piece(text: str) -> Piece:
    """Return a piece of text, whose tokens are not counted yet."""
    if not text:
        raise ValueError("a turn says nothing")
    return Piece(f"text {text}", 0, text)


def _blocks(ids: Sequence[Any], length: int, number: int) -> tuple[Piece, ...]:
    """Return a prompt of Mooncake's blocks; what the ids do not cover is the request's own."""
    pieces: list[Piece] = []
    for one in ids:
        tokens = min(BLOCK, length - BLOCK * len(pieces))
        if tokens > 0:
            pieces.append(Piece(f"block {one}", tokens))
    if (left := length - BLOCK * len(ids)) > 0:
        pieces.append(Piece(f"{number} own", left))
    return tuple(pieces)


def _turn_of(ids: Sequence[Any], blocks: dict[tuple[Any, ...], int]) -> int:
    """Return a request's turn: one more than the longest earlier prompt that it goes on from.

    The last block of a prompt is not full, so that the next turn replaces it. A shared system
    prompt alone is no earlier turn.

    Args:
        ids: of the request's blocks.
        blocks: turns of earlier requests by their full blocks; the request's is added.
    """
    known = (blocks.get(tuple(ids[:length])) for length in range(len(ids) - 1, 0, -1))
    turn = next((earlier + 1 for earlier in known if earlier is not None), 1)
    if len(ids) > 1:
        blocks[tuple(ids[:-1])] = turn
    return turn


def _conversation(talk: Sequence[Any], number: int, output_tokens: int) -> list[Turn]:
    """Return the turns of a recorded conversation; answers keep their recorded length."""
    turns: list[Turn] = []
    question: list[str] = []
    for message in talk:
        said = message.get("value", message.get("content"))
        who = message.get("from", message.get("role"))
        if not isinstance(said, str) or not isinstance(who, str):
            raise ValueError("a message has no role or text")
        if who in ASKING:
            question.append(said)
        elif any(question):
            length = max(1, round(len(said) / CHARACTERS_PER_TOKEN)) if said else output_tokens
            turns.append(Turn((text_piece("\n".join(question)),), length))
            question = []
    return turns


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a length is {value!r}, must be a whole number from 1")
    return value
