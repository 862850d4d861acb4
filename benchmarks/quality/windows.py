"""Windows of long texts as token ids, and the server's log-probabilities of them."""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.loadtest.server import fetch

from .client import Target
from .samples import EvalError

MOST = 12  # characters of text that hold a token, at most
USUAL = 6  # the same of English (4 to 5) and of source code (3 to 4)
LARGE = 49152  # bytes of a module that is long enough to need its own far parts
# Folders of the standard library that hold no ordinary code.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings",
           "pydoc_data", "lib2to3", "ensurepip"}  # fmt: skip


class Window(NamedTuple):
    """A run of tokens of the text: its number and its token ids."""

    number: int
    tokens: list[int]

    @property
    def digest(self) -> str:
        """Return the first 16 hexadecimal digits of the SHA-256 of the ids."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()[:16]


class Text(NamedTuple):
    """A text and its name in results."""

    name: str
    content: str


def read_text(path: Path, option: str) -> Text:
    """Read a text file; its name is the file's without the ending.

    Raises:
        EvalError: if it cannot be read, naming the option.
    """
    try:
        return Text(path.stem, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{option} {path} cannot be read ({error})") from None


def library_code() -> Text:
    """Return the large modules of this Python's standard library, without tests, by path.

    Large ones, for a window of tens of thousands of tokens then ends in a module that began
    thousands of tokens before, and names of that beginning recur.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts = [
        f"# {path.relative_to(root).as_posix()}\n{path.read_text('utf-8', 'replace')}\n"
        for path in sorted(root.rglob("*.py"))
        if path.stat().st_size >= LARGE and not SKIPPED & set(path.relative_to(root).parts)
    ]
    return Text(f"python-{platform.python_version()}", "".join(parts))


def consecutive(target: Target, text: Text, context: int, number: int) -> list[Window]:
    """Cut a text into windows that begin evenly spaced and do not overlap.

    Args:
        target: the server whose tokenizer counts.
        text: the text.
        context: length of a window in tokens.
        number: of windows.

    Raises:
        EvalError: if the text is too short.
    """
    step = len(text.content) // number
    windows = []
    for index in range(number):
        start = index * step
        part = text.content[start : start + min(step, MOST * context)]
        tokens = tokenize(target, part)[:context]
        if len(tokens) < context:
            raise EvalError(
                f"{text.name} has no {number} windows of {context} tokens: window {index} has "
                f"{len(tokens)}"
            )
        windows.append(Window(index, tokens))
    return windows


def ending(target: Target, text: Text, context: int, number: int) -> list[Window]:
    """Cut windows whose ends are evenly spaced; they may overlap but end at different words.

    Args:
        target: the server whose tokenizer counts.
        text: the text.
        context: length of a window in tokens.
        number: of windows.

    Raises:
        EvalError: if the text is too short for a window, or two windows would be the same.
    """
    content = text.content
    first = min(len(content), MOST * context)
    windows = []
    for index in range(number):
        end = first + index * (len(content) - first) // max(number - 1, 1)
        if end < len(content):
            end = content.rfind(" ", 0, end) if " " in content[:end] else end
        tokens: list[int] = []
        for characters in (USUAL * context, MOST * context):
            if len(tokens) < context:
                tokens = tokenize(target, content[max(0, end - characters) : end])[-context:]
        if len(tokens) < context:
            raise EvalError(f"{text.name} has {len(tokens)} tokens, must have {context} at least")
        windows.append(Window(index, tokens))
    if len({window.digest for window in windows}) < number:
        raise EvalError(f"{text.name} is too short for {number} windows of {context} tokens")
    return windows


def tokenize(target: Target, text: str) -> list[int]:
    """Return the server's token ids of a text, without any that it adds.

    Raises:
        EvalError: if the server has no such service.
    """
    body = {"model": target.model, "prompt": text, "add_special_tokens": False}
    try:
        status, page = fetch(target.url + "/tokenize", body)
        if status == 200:
            return list(json.loads(page)["tokens"])
    except (OSError, ValueError, KeyError) as error:
        status, page = 0, str(error)
    raise EvalError(
        f"{target.url}/tokenize gives no tokens (HTTP {status}: {page[:200]}), must be vLLM's"
    )


def log_probabilities(choice: Any, tokens: Sequence[int]) -> list[float] | None:
    """Return the log-probability of each token of a prompt but the first, in nats.

    Args:
        choice: the answer to a request with ``prompt_logprobs`` 0.
        tokens: of the prompt.

    Returns:
        ``len(tokens) - 1`` numbers; None where the answer lacks one.
    """
    try:
        logprobs = choice.model_extra["prompt_logprobs"]
        pairs = zip(tokens[1:], logprobs[1:], strict=True)
        return [float(known[str(token)]["logprob"]) for token, known in pairs]
    except (KeyError, TypeError, ValueError):
        return None
