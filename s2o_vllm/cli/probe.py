"""``s2o probe``: tell whether a server still works, where ``/health`` only tells that it listens.

A worker that stands still leaves ``/health`` at 200. This asks for one token. A server that is busy
with long prompts may not answer in time either: it lives if its counters of tokens move.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from .server_process import metric, read

DEAD = 1
MOVING = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_count",
)
LEAST_TIMEOUT = 1.0  # seconds


def answers(url: str, timeout: float) -> str | None:
    """Ask for one token; return None if it came, else why not.

    Args:
        url: of the server, without a path.
        timeout: seconds to wait for it.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        models = urllib.request.Request(f"{url}/v1/models", headers=headers)
        with urllib.request.urlopen(models, timeout=timeout) as page:
            model = json.load(page)["data"][0]["id"]
        body = {"model": model, "prompt": [1], "max_tokens": 1, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=timeout) as page:
            json.load(page)["choices"][0]
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def progress(url: str) -> list[float] | None:
    """Return the server's counters of tokens and steps, None where it has no page of metrics."""
    page = read(f"{url}/metrics")
    return None if page is None else [metric(page, name) for name in MOVING]


def probe(url: str, timeout: float) -> str | None:
    """Tell whether a server works; return None if it does, else why not."""
    before = progress(url)
    begun = time.monotonic()
    problem = answers(url, timeout)
    if problem is None:
        return None
    after = progress(url)
    late = time.monotonic() - begun >= timeout
    if late and before is not None and after is not None and after != before:
        return None  # it works on other requests
    return problem


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS",
        help="for the token; longer than a step of the longest chunk (default: %(default)s)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if the server works, else 1 with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.timeout >= LEAST_TIMEOUT:
        parser.error(f"--timeout is {args.timeout:g}, must be at least {LEAST_TIMEOUT:g}")
    problem = probe(args.url.rstrip("/"), args.timeout)
    if problem is not None:
        print(f"s2o probe: {args.url} gives no token ({problem})", file=sys.stderr)
        return DEAD
    return 0
