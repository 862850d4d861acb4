"""What every backend must do, whatever it runs on: the batches, and how they are judged."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch

from backends import Backend, Row, Step, decode, row_errors
from cases import dense_attention, relative_error
from s2o_vllm import compat
from s2o_vllm.kernels import decode_state
from s2o_vllm.kernels.layout import DENSE_START, HISTORY, LIST_LENGTH
from s2o_vllm.kernels.output_error import ERROR_UNIT
from s2o_vllm.requests import RequestInfo
from s2o_vllm.step_plan import DENSE_TAIL

BATCHES = {
    "one decode": [decode(77)],
    "decodes": [decode(1), decode(31), decode(32), decode(900)],
    "one prompt": [Row(200, 200)],
    "prompts": [Row(33, 33), Row(128, 128), Row(70, 70)],
    "one chunk": [Row(150, 700)],
    "chunks": [Row(64, 320), Row(1, 65), Row(100, 1101), Row(64, 64)],
    "mixed": [decode(600), decode(40), Row(90, 90), Row(17, 530), Row(1, 300), Row(130, 1000)],
    "drafts": [Row(4, 700, False), Row(3, 50, False), Row(100, 400)],
    "decode last": [Row(130, 640), Row(40, 40), decode(300)],
}
HEADS = [(4, 4), (8, 2), (6, 1)]
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rounding of the output
SETTINGS = {"sparsity_budget": 0.9999, "min_context": 0, "segment_size": 64}


def maker(stock, ours, model, device, shape):
    """A function that makes backends, each once: S2O's, or with ``stock_only`` its parent."""
    made = {}

    def make(*, stock_only=False, dtype=torch.bfloat16, fp8=False, sinks=False, **options):
        sizes = shape | {key: options.pop(key) for key in shape if key in options}
        key = (stock_only, dtype, fp8, sinks, *sorted((sizes | options).items()))
        if key not in made:
            made[key] = Backend(
                stock if stock_only else ours, model, **sizes, dtype=dtype, device=device, fp8=fp8,
                sinks=sinks,
                settings=None if stock_only else SETTINGS | options,
            )  # fmt: skip
        return made[key]

    return make


def check_full(ours: Backend, stock: Backend, rows: list[Row], **options) -> None:
    """With the whole history in the lists, S2O is dense attention.

    Sparse rows: error against fp64 at most twice that of PyTorch attention in the same dtype
    (or the rounding of the output). The parent's rows are as good as the parent is alone.
    """
    step = ours.step(rows, **options)
    output, plan = ours.attend(step, full=any(_sparse(row) for row in rows))
    truth, torchs = dense_attention(step.batch), dense_attention(step.batch, step.batch.query.dtype)
    parents, _ = stock.attend(step)
    floor = FLOOR[step.batch.query.dtype]
    errors = zip(*(row_errors(step, x, truth) for x in (output, torchs, parents)), strict=True)
    sparse = {row.row for row in plan.sparse_rows} if plan else set()
    assert sparse == {number for number, row in enumerate(rows) if _sparse(row)}
    for number, (error, own_dtype, parent) in enumerate(errors):
        limit = 2 * own_dtype if number in sparse else 1.5 * parent
        assert error <= max(limit, floor), f"row {number}, {rows[number]}"


def check_nearly_full(ours: Backend, rows: list[Row], **options) -> None:
    """A budget just under 1 leaves out one token of each history, and little of the output.

    Of n tokens alike, one is worth 1/√n of the output: 0.13 of the shortest history here.
    """
    step = ours.step(rows, **options)
    output, plan = ours.attend(step)
    for work in plan.work:
        for item in work.segments.tolist():
            assert item[DENSE_START] == item[HISTORY]
            assert item[LIST_LENGTH] == max(item[HISTORY] - 1, 0)
    errors = row_errors(step, output, dense_attention(step.batch))
    assert max(errors) < 0.15, errors


def check_alone(ours: Backend, rows: list[Row]) -> None:
    """A sparse row's output does not depend on what is computed beside it, to the bit."""
    step = ours.step(rows)
    output, plan = ours.attend(step)
    assert plan.sparse_rows
    for row in plan.sparse_rows:
        own, _ = ours.attend(ours.alone(step, row.row))
        assert torch.equal(own, output[step.tokens(row.row)]), f"row {row.row}, {rows[row.row]}"


def check_end_of_prompt(ours: Backend, stock: Backend, rows: list[Row]) -> None:
    """Where a row's prompt ends, its output is stock's; what comes before it in a chunk is not."""
    step = ours.step(rows)
    asked = [RequestInfo({"sparsity_budget": 0.1}, row.length) for row in rows]
    with patch.object(compat.requests, "of_rows", lambda *_: asked):
        output, plan = ours.attend(step)
    parents, _ = stock.attend(step)
    floor = FLOOR[step.batch.query.dtype]
    for number in range(len(rows)):
        tokens = step.tokens(number)
        end = slice(max(tokens.start, tokens.stop - DENSE_TAIL), tokens.stop)
        torch.testing.assert_close(output[end], parents[end], atol=floor, rtol=0)
    assert plan.sparse_rows
    for row in plan.sparse_rows:
        assert row.context + row.num_queries == rows[row.row].length - DENSE_TAIL
        if row.context:  # else nothing is left out of a first segment
            before = slice(row.query_start, row.query_start + row.num_queries)
            assert relative_error(output[before], parents[before]) > 0.05


DECODE = {"decode_min_context": 0, "decode_requests": 2}


def check_decode(ours: Backend, *, full: bool, prompt: int = 690, tokens: int = 8) -> None:
    """An answer's tokens, each in a step of its own, after a prompt in two chunks.

    With everything in the lists decode is dense attention, as in :func:`check_full`; with half of
    the history in them it is nearer to it than with a random half.
    """
    step = ours.step([Row(prompt + tokens, prompt + tokens)])
    own = [RequestInfo({"sparsity_budget": 0.9999}, prompt, "request")]
    truth, torchs = dense_attention(step.batch), dense_attention(step.batch, step.batch.query.dtype)
    errors = []
    with (
        patch.object(compat.requests, "of_rows", lambda *_: own),
        every_token() if full else nullcontext(),
    ):
        for start, count in ((0, 300), (300, prompt - 300)):
            _, plan = ours.attend(ours.part(step, start, count))
        assert len(plan.snapshots) == 1
        for position in range(prompt, prompt + tokens):
            output, plan = ours.attend(decoding(ours.part(step, position, 1)))
            ((_, query, context, *_),) = plan.decode.rows
            assert (query, context, plan.work) == (0, position, [])
            assert [part.tokens for part in plan.dense] == [(0, 1)], "the parent's, of one token"
            (item,) = plan.decode.work.segments.tolist()
            assert item[DENSE_START] == (position // 64 - 1) * 64
            error, usual = (
                relative_error(x, truth[position : position + 1])
                for x in (output, torchs[position : position + 1])
            )
            if full:
                assert error <= max(2 * usual, FLOOR[step.batch.query.dtype]), position
            else:
                assert item[LIST_LENGTH] == int(0.5 * item[DENSE_START])
            errors.append(error)
    # Lists of half the history by random scores give some 0.87, these 0.55 to 0.75.
    assert full or sum(errors) / len(errors) < 0.8, errors


def every_token():
    """Let lists of decode hold all tokens, which no budget below 1 asks for."""
    line = decode_state.decode_line
    return patch.object(decode_state, "decode_line", lambda row, _: line(row, 1.0))


def decoding(step: Step) -> Step:
    """The same step, of a request that has read its prompt."""
    common = replace(step.common, is_prefilling=torch.zeros(1, dtype=torch.bool))
    return replace(step, common=common)


def check_shadow(ours: Backend, plain: Backend, rows: list[Row]) -> None:
    """The error that is counted is that of the sampled queries; being watched changes nothing."""
    step = ours.step(rows)
    output, plan, error, count = shadowed(ours, step)
    tokens = plan.shadow.tokens
    assert count == len(tokens) > 0
    truth = dense_attention(step.batch)[tokens].double().flatten(1)
    errors = (output[tokens].double().flatten(1) - truth).norm(dim=1) / truth.norm(dim=1)
    floor = FLOOR[step.batch.query.dtype]
    assert abs(error - float(errors.sum())) < (1e-3 * error + 2 * floor * count)
    assert error / count > 0.05
    assert torch.equal(plain.attend(step)[0], output)


def shadowed(ours: Backend, step: Step) -> tuple:
    """A step's output and plan, and the errors and rows that its layer counts."""
    shadow = ours.layer.impl._s2o_shadow
    before = [0, 0] if shadow is None else shadow.counters.tolist()
    output, plan = ours.attend(step)
    after = ours.layer.impl._s2o_shadow.counters.tolist()
    error, count = (new - old for new, old in zip(after, before, strict=True))
    return output, plan, error * ERROR_UNIT, count


def _sparse(row: Row) -> bool:
    return row.prefill and row.queries > 1 and row.length > 1
