"""Compare what this device computes with dense attention and with the reference, on small inputs.

`s2o doctor` does so, and a server with ``--s2o-self-test`` before it takes requests. On a CPU,
where the operator is its own reference, dense attention alone is compared with.
"""

import functools
import time
from typing import NamedTuple

import torch

from .kernels import prefill
from .kernels.attention import reference as attention_reference
from .kernels.layout import NUM_COUNTERS
from .kernels.shape import Shape
from .kernels.work_list import PrefillRow, WorkList, build_work_lists

HEADS, KV_HEADS, PAGE = 4, 2, 16
CONTEXT, QUERIES, SEGMENT = 4096, 128, 64  # tokens; two segments
SPAN = 512  # queries: chunks of 2,048 tokens, so that the history has clusters
MAX_QUERIES = 8 * QUERIES  # so that two whole lists fit a launch
NEEDLE = 1234  # position of the token that every query wants
NEEDLE_LENGTH = 40.0  # of its key and of what is added to each query: all mass is on it
BUDGET = 0.1
# Relative error that rounding explains, with room: what the kernels' tests allow.
LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


class SelfTestError(RuntimeError):
    """This device computes something else; the message is one sentence for the user."""


class Case(NamedTuple):
    """A layer that is tried."""

    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {str(self.dtype).removeprefix('torch.')}"


CARD_CASES = (
    Case(64, torch.bfloat16),
    Case(128, torch.bfloat16),
    Case(128, torch.float16),
    Case(256, torch.bfloat16),
)
CPU_CASES = (Case(64, torch.bfloat16),)


class Inputs(NamedTuple):
    """Queries behind a history, in a cache of shuffled blocks.

    Attributes:
        query: ``[QUERIES, HEADS, head_dim]``.
        kv_cache: ``[blocks, KV_HEADS, PAGE, 2 * head_dim]``.
        block_table: int32 ``[1, blocks]``.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor


def make_inputs(case: Case, device: torch.device, needle: bool) -> Inputs:
    """Return random inputs, the same on every device; with a token that every query wants."""
    generator = torch.Generator().manual_seed(0)
    blocks = (CONTEXT + QUERIES) // PAGE

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    query = draw(QUERIES, HEADS, case.head_dim)
    cache = draw(blocks, KV_HEADS, PAGE, 2 * case.head_dim)
    table = torch.randperm(blocks, generator=generator, device="cpu")
    if needle:
        direction = torch.nn.functional.normalize(draw(case.head_dim), dim=0) * NEEDLE_LENGTH
        cache[table[NEEDLE // PAGE], :, NEEDLE % PAGE, : case.head_dim] = direction
        query += direction
    return Inputs(
        query.to(device, case.dtype), cache.to(device, case.dtype), table.to(device).int()[None]
    )


def dense(inputs: Inputs) -> torch.Tensor:
    """Return causal attention over all tokens in float64: ``[QUERIES, HEADS, head_dim]``."""
    head_dim = inputs.query.shape[2]
    tokens = inputs.kv_cache[inputs.block_table[0].long()].transpose(1, 2).flatten(0, 1).double()
    keys, values = tokens.repeat_interleave(HEADS // KV_HEADS, 1).split(head_dim, -1)
    scores = torch.einsum("qhd,nhd->hqn", inputs.query.double(), keys) * head_dim**-0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(CONTEXT + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqn,nhd->qhd", weights, values)


def work_at(budget: float, shape: Shape, device: torch.device) -> WorkList:
    """Return the work list of the queries at a budget."""
    rows = [PrefillRow(0, 0, QUERIES, CONTEXT, budget)]
    (work,) = build_work_lists(rows, SEGMENT, 0, device, shape.limits, SPAN)
    return work


def attend(operator: prefill.SparsePrefill, inputs: Inputs, work: WorkList) -> torch.Tensor:
    """Return what the operator computes: ``[QUERIES, HEADS, head_dim]``."""
    out, counters = empty_output(inputs)
    operator(*inputs, work, out, counters)
    return out


def refer(operator: prefill.SparsePrefill, inputs: Inputs, work: WorkList) -> torch.Tensor:
    """Return the reference's attention to the lists that the kernels made in the last call.

    Shaped ``[QUERIES, HEADS, head_dim]``.
    """
    out, counters = empty_output(inputs)
    assert operator.space is not None
    attention_reference.attend(
        *inputs, work, operator.space.selection.lists(work),
        attention_reference.summarise(inputs.kv_cache, inputs.block_table, work, out.dtype),
        out, counters, scale=operator.scale, queries_per_tile=SEGMENT,
    )  # fmt: skip
    return out


def empty_output(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an output that is NaN, shaped as the queries, and counters ``[NUM_COUNTERS]``."""
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=inputs.query.device)
    return torch.full_like(inputs.query, float("nan")), counters


def check(case: Case, device: torch.device) -> None:
    """Try one layer: a whole list, a short list, and on a card that list by the reference.

    Raises:
        SelfTestError: naming the case, the error and its limit.
    """
    shape = Shape(HEADS, KV_HEADS, case.head_dim, CONTEXT + QUERIES, MAX_QUERIES, SEGMENT)
    operator = prefill.SparsePrefill(shape, case.dtype, device, scale=case.head_dim**-0.5)
    whole, short = (work_at(budget, shape, device) for budget in (1.0, BUDGET))
    inputs = make_inputs(case, device, needle=False)
    try:
        compare(case, "all tokens", attend(operator, inputs, whole), dense(inputs))
        if operator.space is not None:
            found = attend(operator, inputs, short)
            compare(case, f"a budget of {BUDGET}", found, refer(operator, inputs, short))
        inputs = make_inputs(case, device, needle=True)
        found = attend(operator, inputs, short)
        compare(case, "one token that every query wants", found, dense(inputs))
    finally:
        prefill.release(shape, case.dtype, device)


def compare(case: Case, what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare two outputs ``[QUERIES, HEADS, head_dim]``.

    Raises:
        SelfTestError: if they are farther apart than rounding explains.
    """
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error <= LIMITS[case.dtype]:  # nor NaN
        raise SelfTestError(
            f"with {case} and {what} the relative error is {error:.2g}, must be at most "
            f"{LIMITS[case.dtype]}"
        )


@functools.cache
def run(device: torch.device) -> str:
    """Try all cases on a device, once a process: some seconds, plus what Triton compiles.

    Returns:
        One sentence that names the device.

    Raises:
        SelfTestError: naming the device and what is wrong with it.
    """
    card = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if card else "the CPU"
    cases, start = CARD_CASES if card else CPU_CASES, time.monotonic()
    for case in cases:
        try:
            check(case, device)
        except SelfTestError as error:
            raise SelfTestError(f"S2O computes wrong attention on {name}: {error}") from None
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise SelfTestError(
                f"S2O's kernels do not run on {name}: with {case} {type(error).__name__}: {first}"
            ) from error
    dims = ", ".join(str(dim) for dim in sorted({case.head_dim for case in cases}))
    seconds = time.monotonic() - start
    return f"S2O agrees with dense attention on {name} (head_dim {dims}; {seconds:.1f} s)"
