"""Nats lost on far tokens by a Hugging Face model whose attention is ours, without a server.

``python -m s2o_vllm.benchmarks.research.in_process MODEL`` runs windows of text densely and
sparsely in one process and prints what each kind of list loses: seconds a window on a GPU. So a
criterion is known before a kernel is written for it. ``--lists exact`` chooses the tokens by their
exact probabilities, the largest over the query rows that share a list: no estimate exceeds that.

Far tokens are those of `s2o eval fidelity`: see :mod:`..quality.far_tokens`. Of every window the
last ``--judged`` tokens count, but the last 64, which stay dense as in a server.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels.layout import (
    ELIGIBLE,
    NUM_COUNTERS,
    VISITED,
)
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.work_list import PrefillRow, build_work_lists

from ..quality.far_tokens import DENSE_END, find
from ..quality.intervals import mean_clustered
from ..quality.windows import library_code, read_text
from ..result_file import header, save
from . import tuned
from .exact_lists import choose_exactly

PAGE = 16  # tokens of a block of the cache that prompts are laid out in
ATTENTION = "s2o_in_process"  # its name in transformers


class Setting(NamedTuple):
    """How prompts are attended to.

    Attributes:
        lists: `served`, by the operator's ranking, or `exact`.
        ranking: of ``RANKINGS``; it has its own segment.
        budget: the sparsity budget.
        min_tokens: history tokens that a query may visit however small the budget is.
        chunk: tokens of a prefill chunk.
    """

    lists: str
    ranking: str
    budget: float
    min_tokens: int
    chunk: int


class Attention:
    """What transformers calls for every layer: dense, or sparse by a setting."""

    def __init__(self, setting: Setting | None, longest: int):
        self.setting, self.longest = setting, longest
        self.operator: SparsePrefill | None = None
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)

    @property
    def density(self) -> float | None:
        """Share of the eligible history that was visited."""
        counted = self.counters.tolist()
        return counted[VISITED] / counted[ELIGIBLE] if counted[ELIGIBLE] else None

    def make(self, query: Tensor, kv_heads: int, scale: float) -> SparsePrefill:
        """Return the operator for queries ``[tokens, heads, head_dim]``; made once."""
        assert self.setting is not None
        if self.operator is None:
            ranking, chunk = self.setting.ranking, self.setting.chunk
            shape = Shape(
                query.shape[1], kv_heads, query.shape[2], self.longest, chunk,
                RANKINGS[ranking], ranking,
            )  # fmt: skip
            self.operator = SparsePrefill(shape, query.dtype, query.device, scale=scale)
            self.counters = self.counters.to(query.device)
            if self.setting.lists == "exact":
                choose_exactly(self.operator)
        return self.operator

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any
    ) -> tuple[Tensor, None]:
        """Attend; queries ``[1, heads, tokens, head_dim]``, returns tokens before heads."""
        scale = more["scaling"]
        end = query.shape[2] - DENSE_END
        if self.setting is None or end <= 0:
            out = dense(query, key, value, scale, 0)
            return out.transpose(1, 2), None
        sparse = self.sparse(query[0, :, :end], key[0], value[0], scale)
        rest = dense(query[:, :, end:], key, value, scale, end)[0].transpose(0, 1)
        return torch.cat([sparse, rest])[None], None

    def sparse(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend chunk by chunk; all ``[heads, tokens, head_dim]``, returns tokens first."""
        kv_heads, tokens, head_dim = key.shape
        pages = -(-tokens // PAGE)
        cache = key.new_zeros(pages * PAGE, kv_heads, 2 * head_dim)
        cache[:tokens, :, :head_dim], cache[:tokens, :, head_dim:] = (
            part.transpose(0, 1) for part in (key, value)
        )
        cache = cache.unflatten(0, (pages, PAGE)).transpose(1, 2).contiguous()
        table = torch.arange(pages, dtype=torch.int32, device=key.device)[None]
        query = query.transpose(0, 1).contiguous()
        operator = self.make(query, kv_heads, scale)
        out = torch.empty_like(query)
        setting = self.setting
        assert setting is not None
        for start in range(0, query.shape[0], setting.chunk):
            part = query[start : start + setting.chunk]
            row = PrefillRow(
                0, 0, part.shape[0], start, setting.budget, min_tokens=setting.min_tokens
            )
            limits = operator.shape.limits
            own = out[start : start + setting.chunk]
            for work in build_work_lists([row], operator.shape.segment, 0, key.device, limits):
                operator(part, cache, table, work, own, self.counters)
        return out


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, start: int) -> Tensor:
    """Causal attention of queries that begin at ``start``; ``[1, heads, tokens, head_dim]``."""
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True
    )
    if start == 0:
        return attend(query, key, value, is_causal=True)
    position = torch.arange(key.shape[2], device=key.device)
    last = start + torch.arange(query.shape[2], device=key.device)
    return attend(query, key, value, attn_mask=position <= last[:, None])


class Model:
    """A causal language model and its log-probabilities under an attention."""

    def __init__(self, folder: Path, device: str):
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        self.attention = Attention(None, 1)
        AttentionInterface.register(ATTENTION, lambda *args, **more: self.attention(*args, **more))
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **more: None)
        loading: Any = AutoModelForCausalLM.from_pretrained
        loaded = loading(folder, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        self.model = loaded.to(device)

    def logprobs(self, tokens: Sequence[int], first: int, attention: Attention) -> list[float]:
        """Return the log-probabilities of ``tokens[first:]``, in nats."""
        return self.read(tokens, first, attention)[0]

    @torch.inference_mode()
    def read(
        self, tokens: Sequence[int], first: int, attention: Attention
    ) -> tuple[list[float], list[bool]]:
        """Return those, and whether each of these tokens is the likeliest one."""
        self.attention = attention
        ids = torch.tensor(tokens, device=self.model.device)
        hidden = self.model.base_model(ids[None], use_cache=False).last_hidden_state[0]
        found: list[float] = []
        likeliest: list[bool] = []
        for start in range(first, len(tokens), 512):
            logits = self.model.lm_head(hidden[start - 1 : start + 511]).float()
            wanted = ids[start : start + 512]
            known = logits[: len(wanted)].log_softmax(-1).gather(1, wanted[:, None])
            found += known[:, 0].tolist()
            likeliest += (logits[: len(wanted)].argmax(-1) == wanted).tolist()
        return found, likeliest


def judge(
    model: Model,
    windows: Sequence[Sequence[int]],
    judged: int,
    near: int,
    settings: Sequence[Setting],
) -> Iterator[dict[str, Any]]:
    """Yield what each setting loses on the far tokens of some windows; windows are the samples.

    Raises:
        SystemExit: if there is none.
    """
    longest = max(map(len, windows))
    dense_one = Attention(None, longest)
    known: list[tuple[list[float], list[int]]] = []
    for tokens in windows:
        first = len(tokens) - DENSE_END - judged
        whole = model.logprobs(tokens, first, dense_one)[:judged]
        short: list[float] = []
        for start in range(first, first + judged, max(near // 4, 1)):
            end = min(start + max(near // 4, 1), first + judged)
            short += model.logprobs(tokens[start - near : end], near, dense_one)
        known.append((whole, [one.number for one in find(whole, {near: short}, len(tokens))]))
    if not any(far for _, far in known):
        raise SystemExit("in_process: no judged token needs far context: take more windows")
    for setting in settings:
        attention, lost = Attention(setting, longest), []
        for tokens, (whole, far) in zip(windows, known, strict=True):
            own = model.logprobs(tokens, len(tokens) - DENSE_END - judged, attention)
            if far:
                lost.append([whole[place] - own[place] for place in far])
        value, low, high = mean_clustered(lost)
        yield (
            setting._asdict()
            | {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
            | {"samples": sum(map(len, lost)), "density": attention.density}
            | {"tuned": dict(tuned.CHANGED)}
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.research.in_process", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--text", type=Path, metavar="FILE", help="UTF-8 (default: this Python's large modules)")
    add("--windows", type=int, default=10, metavar="N")
    add("--context", type=int, default=32768, metavar="TOKENS", help="of a window")
    add("--judged", type=int, default=2048, metavar="TOKENS")
    add("--near", type=int, default=2048, metavar="TOKENS")
    add("--lists", nargs="+", choices=("served", "exact"), default=["served", "exact"])
    add("--rankings", nargs="+", choices=RANKINGS, default=["low_rank"])
    add("--budgets", nargs="+", type=float, default=[0.0125], metavar="B")
    add("--min-budget-tokens", type=int, default=1024, metavar="TOKENS")
    add("--chunk", type=int, default=8192, metavar="TOKENS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("benchmarks/results/quality_exact_lists.json"))
    return parser


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Return the settings to compare; exact lists need no ranking but its segment."""
    served = [
        Setting("served", ranking, budget, args.min_budget_tokens, args.chunk)
        for ranking in args.rankings
        for budget in args.budgets
        if "served" in args.lists
    ]
    exact = [
        Setting("exact", args.rankings[0], budget, args.min_budget_tokens, args.chunk)
        for budget in args.budgets
        if "exact" in args.lists
    ]
    return served + exact


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    least = args.judged + args.near + DENSE_END
    if args.context < least:
        print(f"in_process: --context is {args.context}, must be {least} at least", file=sys.stderr)
        return 2
    from transformers import AutoTokenizer

    text = read_text(args.text, "--text") if args.text else library_code()
    encode: Callable[..., list[int]] = AutoTokenizer.from_pretrained(args.model).encode
    ids = encode(text.content, add_special_tokens=False)
    step = len(ids) // args.windows
    if step < args.context:
        print(f"in_process: {text.name} has no {args.windows} windows", file=sys.stderr)
        return 2
    windows = [ids[i * step : i * step + args.context] for i in range(args.windows)]
    model = Model(args.model, args.device)
    rows = []
    for row in judge(model, windows, args.judged, args.near, settings_of(args)):
        rows.append({"model": args.model.name, "source": text.name, "context": args.context} | row)
        save(args.out, header(), rows)  # each as it comes: exact lists take longer than others
        print(
            f"{row['lists']:>6} {row['ranking']:13} budget {row['budget']:<6} "
            f"{row['value']:+.4f} nats [{row['low']:+.4f}, {row['high']:+.4f}] "
            f"({row['samples']} tokens), density {row['density']:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
