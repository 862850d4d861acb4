"""One question to a server, and when each part of its answer came."""

import http.client
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..arms import Arm

TIMEOUT = 1200.0  # seconds without a word: a server under load queues long prompts
ERROR_LENGTH = 200  # characters of a server's message that are kept


@dataclass
class Answer:
    """What came of a question.

    Attributes:
        sent_s: when it was sent, in seconds of `time.perf_counter`.
        ttft_s: seconds to the first token, None if there was none.
        gaps_s: seconds from each piece of the answer to the next.
        tokens: token ids of the answer.
        end_s: when its last piece came.
        error: why it failed, in one line, or None.
    """

    sent_s: float = 0.0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end_s: float = 0.0
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None of an answer of one token."""
        return sum(self.gaps_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


def ask(arm: Arm, model: str, prompt: Sequence[int], output_tokens: int, salt: str) -> Answer:
    """Send a prompt of token ids and read its streamed answer; errors are in the answer."""
    body = arm.request_body(salt) | {
        "model": model, "prompt": list(prompt), "max_tokens": output_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    data = json.dumps(body).encode()
    answer = Answer()
    connection = _connect(arm.url)
    try:
        answer.sent_s = answer.end_s = time.perf_counter()
        connection.request("POST", _path(arm.url), data, _headers())
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode(errors="replace")
            answer.error = f"HTTP {response.status}: {text[:ERROR_LENGTH]}"
        else:
            _read(response, answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
    finally:
        connection.close()
    if answer.error is None and len(answer.tokens) != output_tokens:
        answer.error = f"asked for {output_tokens} tokens and got {len(answer.tokens)}"
    return answer


def _read(response: http.client.HTTPResponse, answer: Answer) -> None:
    """Read a stream of events to its end."""
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        now = time.perf_counter()
        event = json.loads(line[len(b"data: ") :])
        if problem := event.get("error"):  # an error after the stream began is an event
            answer.error = str(problem)[:ERROR_LENGTH]
            return
        choice: dict[str, Any] = (event.get("choices") or [{}])[0]
        if not (new := choice.get("token_ids")):
            continue
        if answer.ttft_s is None:
            answer.ttft_s = now - answer.sent_s
        else:
            answer.gaps_s.append(now - answer.end_s)
        answer.tokens += new
        answer.end_s = now


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=TIMEOUT)


def _path(url: str) -> str:
    return urlsplit(url).path + "/v1/completions"


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return headers
