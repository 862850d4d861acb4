"""What is compared: a name, a server and a budget."""

import math
from dataclasses import dataclass
from urllib.parse import urlsplit


class LoadTestError(Exception):
    """The load test cannot go on; the message is one sentence for the user."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: how the result file calls it (its ``backend``).
        url: the server, without a path.
        budget: sparsity budget sent with every request; None leaves the server's own.
    """

    name: str
    url: str
    budget: float | None = None

    def request_body(self, salt: str) -> dict[str, object]:
        """Return what is added to every request.

        The salt keeps a run from finding its prompts in the prefix cache of an earlier one,
        which would measure the cache and not the prefill.
        """
        body: dict[str, object] = {"cache_salt": salt}
        if self.budget is not None:
            body["vllm_xargs"] = {"s2o_sparsity_budget": self.budget}
        return body


def parse_arm(text: str) -> Arm:
    """Read ``name=URL[,budget=B]``.

    Raises:
        LoadTestError: naming the text and what is allowed.
    """
    allowed = "must be name=URL or name=URL,budget=B with 0 < B <= 1"
    first, *options = text.split(",")
    name, _, url = first.partition("=")
    parts = urlsplit(url)
    if not name or parts.scheme not in ("http", "https") or not parts.netloc:
        raise LoadTestError(f"--arm is {text!r}, {allowed}")
    budget = None
    for option in options:
        key, _, value = option.partition("=")
        try:
            budget = float(value)
        except ValueError:
            budget = math.nan
        if key != "budget" or not 0 < budget <= 1:
            raise LoadTestError(f"--arm is {text!r}, {allowed}")
    return Arm(name, url.rstrip("/").removesuffix("/v1"), budget)


def parse_arms(texts: list[str]) -> list[Arm]:
    """Read all arms and refuse two that a result row could not tell apart.

    Raises:
        LoadTestError: for an arm that cannot be read, or one that is given twice.
    """
    arms = [parse_arm(text) for text in texts]
    seen: set[tuple[str, float | None]] = set()
    for arm in arms:
        if (arm.name, arm.budget) in seen:
            raise LoadTestError(f"--arm {arm.name!r} is given twice: names or budgets must differ")
        seen.add((arm.name, arm.budget))
    return arms
