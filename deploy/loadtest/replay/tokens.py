"""Prompts as token ids: real text through the server's own tokenizer."""

import json
import random
import re
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..arms import Arm, LoadTestError
from ..server import Server, fetch
from .traces import Piece, Session

CHUNK = 4000  # characters that are tokenized at once: short enough for servers of 4,096 tokens
LOWEST_ID, HIGHEST_ID = 1000, 30000  # ordinary tokens of any large vocabulary
SEVERAL = 2.0  # times the longest piece: the text that pieces are drawn from
FEWEST_KINDS = 32  # different ids that a text must have: else every prompt shares its blocks
WORD = re.compile(r"\w+|[^\w\s]")


def source_files(seed: int) -> Iterator[str]:
    """Yield real text that every machine has: the sources of Python's own library, shuffled."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    random.Random(seed).shuffle(files)
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")


@dataclass
class Tokens:
    """Gives a piece its token ids.

    Attributes:
        pool: tokens of the text that pieces are drawn from.
        seed: of the draws.
        texts: tokens of pieces that are text themselves, by key.
    """

    pool: array
    seed: int
    texts: dict[str, array] = field(default_factory=dict)

    def of(self, piece: Piece) -> list[int]:
        """Return a piece's token ids: the same for a seed and the piece's key."""
        if piece.text is not None:
            return self.texts[piece.key].tolist()
        start = random.Random(f"{self.seed} {piece.key}").randrange(len(self.pool))
        ids = self.pool[start : start + piece.tokens]
        while len(ids) < piece.tokens:
            ids += self.pool[: piece.tokens - len(ids)]
        return ids.tolist()


class Tokenizer:
    """A server's tokenizer, or where it has none one id for each word.

    Attributes:
        url: the server.
        model: its served name.
        stands_in: the server has no tokenizer, so ids stand for words.
    """

    def __init__(self, arm: Arm, server: Server):
        self.url, self.model = arm.url, server.model
        self.stands_in = False
        self.stands_in = not self.encode("text")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a short text."""
        if self.stands_in:
            span = HIGHEST_ID - LOWEST_ID
            return [LOWEST_ID + zlib.crc32(word.encode()) % span for word in WORD.findall(text)]
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        status, page = fetch(f"{self.url}/tokenize", body)
        return list(json.loads(page)["tokens"]) if status == 200 else []

    def encode_all(self, texts: Iterable[str], enough: float = float("inf")) -> array:
        """Return the token ids of texts one after the other, until there are enough."""
        ids = array("I")
        for text in texts:
            for start in range(0, len(text), CHUNK):
                ids.extend(self.encode(text[start : start + CHUNK]))
                if len(ids) >= enough:
                    return ids
        return ids


def prepare(
    sessions: Sequence[Session], tokenizer: Tokenizer, text: Path | None, seed: int
) -> tuple[list[Session], Tokens]:
    """Return the sessions with all lengths counted, and where their tokens come from.

    Args:
        sessions: of a trace.
        tokenizer: of the first server; all must share it.
        text: a file to draw from; Python's own sources without one.
        seed: of the draws.

    Raises:
        LoadTestError: if the text is too uniform to make prompts that differ.
    """
    pieces = {piece for one in sessions for turn in one.turns for piece in turn.pieces}
    texts = {
        piece.key: tokenizer.encode_all([piece.text]) for piece in pieces if piece.text is not None
    }
    drawn = [piece.tokens for piece in pieces if piece.text is None]
    pool = array("I")
    if drawn:
        source = source_files(seed) if text is None else iter([text.read_text(encoding="utf-8")])
        pool = tokenizer.encode_all(source, SEVERAL * max(drawn))
        if len(kinds := set(pool)) < FEWEST_KINDS:
            raise LoadTestError(
                f"--text: the server's tokenizer knows {len(kinds)} tokens of it, must be at least "
                f"{FEWEST_KINDS}: prompts would share all their blocks"
            )
    return [_counted(session, texts) for session in sessions], Tokens(pool, seed, texts)


def _counted(session: Session, texts: dict[str, array]) -> Session:
    turns = tuple(
        replace(
            turn,
            pieces=tuple(
                piece if piece.text is None else replace(piece, tokens=len(texts[piece.key]))
                for piece in turn.pieces
            ),
        )
        for turn in session.turns
    )
    return replace(session, turns=turns)


def say_stand_in(tokenizer: Tokenizer) -> None:
    """Tell the user that ids stand for words."""
    if tokenizer.stands_in:
        print("the server has no tokenizer: an id stands for each word", file=sys.stderr)
