"""What can be learnt from a running server before and after it is loaded."""

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2o_vllm.cli.server_process import ELIGIBLE, VISITED, values

from .arms import Arm, LoadTestError

TIMEOUT = 30.0  # seconds; a server under load answers these late, but it answers
REFUSED_BUDGET = 2.0  # no S2O server accepts it, and a stock server ignores it
SETTLE = 1.5  # seconds until the server's counters have caught up with its last request
HISTORY = {"visited": VISITED, "eligible": ELIGIBLE}
PREFIX = {"hits": "vllm:prefix_cache_hits_total", "queries": "vllm:prefix_cache_queries_total"}


@dataclass(frozen=True)
class Server:
    """What a server says about itself; None where it does not say.

    Attributes:
        model: the name that requests must use.
        tokenizer: where the model's tokenizer is.
        max_model_len: longest prompt and answer together, in tokens.
        vllm: version of vLLM.
        torch: version of PyTorch.
        triton: version of Triton.
        device: the accelerators, or the CPU.
    """

    model: str
    tokenizer: str
    max_model_len: int | None
    vllm: str | None
    torch: str | None = None
    triton: str | None = None
    device: str | None = None

    @property
    def name(self) -> str:
        """The model's name in results: of a folder on the server's machine only the last part."""
        return Path(self.model).name if self.model.startswith("/") else self.model


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Return the status and text of a GET, or of a POST of JSON.

    Raises:
        OSError: if there is no answer.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):  # the variable `vllm bench serve` reads
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def check_reachable(arm: Arm) -> None:
    """Ask the server whether it is healthy.

    Raises:
        LoadTestError: if it does not answer, or says no.
    """
    try:
        status, _ = fetch(arm.url + "/health")
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise LoadTestError(f"{arm.name}: no server answers at {arm.url} ({reason})") from None
    if status != 200:
        raise LoadTestError(f"{arm.name}: {arm.url}/health answered HTTP {status}, must be 200")


def inspect(arm: Arm, model: str | None = None) -> Server:
    """Learn what the server runs.

    Args:
        arm: whose server to ask.
        model: served model to use; the first one by default.

    Raises:
        LoadTestError: if it cannot be reached, or does not serve the model.
    """
    check_reachable(arm)
    models = _json(arm, "/v1/models").get("data") or []
    if not models:
        raise LoadTestError(f"{arm.name}: {arm.url}/v1/models names no model (is a key needed?)")
    card = next((card for card in models if model in (None, card["id"])), None)
    if card is None:
        served = ", ".join(card["id"] for card in models)
        raise LoadTestError(f"{arm.name}: --model is {model!r}, must be one of {served}")
    system = _json(arm, "/server_info?config_format=json").get("system_env") or {}
    return Server(
        model=card["id"],
        tokenizer=card.get("root") or card["id"],
        max_model_len=card.get("max_model_len"),
        vllm=_json(arm, "/version").get("version"),
        torch=system.get("torch_version"),
        triton=_package(system, "triton"),
        device=_device(system),
    )


def check_budget_is_honoured(arm: Arm, server: Server) -> None:
    """Make sure that a sparse arm is not a stock server that ignores the budget.

    Raises:
        LoadTestError: if the server accepts a budget that S2O would refuse.
    """
    if arm.budget in (None, 1.0):
        return
    body = {
        "model": server.model,
        "prompt": "1",
        "max_tokens": 1,
        "vllm_xargs": {"s2o_sparsity_budget": REFUSED_BUDGET},
    }
    status, _ = fetch(arm.url + "/v1/completions", body)
    if status == 200:
        raise LoadTestError(
            f"{arm.name}: {arm.url} ignores budget={arm.budget:g}, must be a server that was "
            "started with --attention-backend s2o"
        )


def history_counters(arm: Arm) -> dict[str, float] | None:
    """Return S2O's counters of visited and eligible tokens, or None where there are none."""
    return _counters(arm, HISTORY)


def prefix_counters(arm: Arm) -> dict[str, float] | None:
    """Return vLLM's counters of prompt tokens asked of the prefix cache and found there."""
    return _counters(arm, PREFIX)


def share(
    before: dict[str, float] | None, after: dict[str, float] | None, part: str, whole: str
) -> float | None:
    """Return by how much one counter has grown over how much another has; None of no growth."""
    if after is None:
        return None
    start = before or dict.fromkeys(after, 0.0)
    grown = after[whole] - start[whole]
    return (after[part] - start[part]) / grown if grown > 0 else None


def _counters(arm: Arm, names: dict[str, str]) -> dict[str, float] | None:
    try:
        _, text = fetch(arm.url + "/metrics")
    except OSError:
        return None
    found = {key: values(text, name) for key, name in names.items()}
    return {key: sum(own) for key, own in found.items()} if all(found.values()) else None


def _json(arm: Arm, path: str) -> dict[str, Any]:
    """Return a JSON object, or an empty one where the server has none at this path."""
    try:
        status, text = fetch(arm.url + path)
        return json.loads(text) if status == 200 else {}
    except (OSError, json.JSONDecodeError):
        return {}


def _package(system: dict[str, Any], name: str) -> str | None:
    """Return a package's version from vLLM's environment report."""
    found = re.search(rf"(?:^|\s){name}==(\S+)", system.get("pip_packages") or "", re.M)
    return found[1] if found else None


def _device(system: dict[str, Any]) -> str | None:
    """Describe the device from vLLM's environment report."""
    models = system.get("nvidia_gpu_models") or ""
    gpus = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", models, re.M)
    if gpus:
        return ", ".join(f"{gpus.count(gpu)}x {gpu}" for gpu in dict.fromkeys(gpus))
    cpu = system.get("cpu_info") or ""
    name = re.search(r"^Model name:\s*(.+)$", cpu, re.M)
    cores = re.search(r"^CPU\(s\):\s*(\d+)$", cpu, re.M)
    return f"{name[1].strip()}, {cores[1]} cores" if name and cores else None
