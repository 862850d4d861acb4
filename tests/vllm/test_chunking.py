"""How a prompt is cut into chunks may change what is served only within a stated tolerance.

Segments are cut at multiples of the sequence. Chunks that are multiples of a segment therefore
rank by the mean query exactly alike. A low-rank basis is fitted to at most 2,048 queries of one
chunk, so with it lists differ between chunkings; and so does either ranking where a chunk ends
inside a segment.

The tolerance: the first token's distribution moves (total variation) by less than twice what
sparsity itself moves it by from dense attention's: two independent errors would move it 1.4 times
as far, and short chunks fit poorer bases. It is this wide because random weights give keys without
structure, to which no two bases are alike, and is asked of the mean of several prompts, for of one
prompt either error may happen to be small.
"""

import json
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from vllm.platforms import current_platform

from backends import Backend, Row
from models import write_model, write_weights

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

# Each way of cutting fits bases of its own, whose scores draw a sample of their own.
TOLERANCE = 2.0
WHOLE, CHUNKS = 4096, (2048, 1024, 512, 300)
PROMPTS = 3

GENERATE = """
    import json, os, random, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler, in this process
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        model, dtype, chunks, prompts = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
        llm = LLM(
            model, enforce_eager=True, max_model_len=4096, max_num_batched_tokens=4096,
            attention_backend="s2o", dtype=dtype, enable_prefix_caching=False,
            max_logprobs=-1, gpu_memory_utilization=0.2,
            additional_config={"s2o": {"min_context": 256}},
        )
        from s2o_vllm import metrics
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        short = {"prompt_token_ids": prompts[0][:40]}
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]

        greedy = {"temperature": 0, "detokenize": False}  # text of every token would take minutes

        def ask(number, budget, chunk, *others):
            scheduler.max_num_scheduled_tokens = chunk
            before = metrics.worker.totals()["s2o:sparse_requests", ""]
            extra = {"s2o_sparsity_budget": budget}
            params = [SamplingParams(max_tokens=4, logprobs=-1, extra_args=extra, **greedy)]
            params += [SamplingParams(max_tokens=60, ignore_eos=True, **greedy)] * len(others)
            # Those before the long prompt are answering while it is prefilled.
            answers = llm.generate([*others, prompts[number]], params[::-1], use_tqdm=False)
            answer = answers[-1].outputs[0]
            first = answer.logprobs[0]
            return {
                "prompt": number,
                "budget": budget, "chunk": chunk, "beside": len(others),
                "logprobs": [first[token].logprob for token in range(vocabulary)],
                "tokens": list(answer.token_ids),
                "chunks": metrics.worker.totals()["s2o:sparse_requests", ""] - before,
            }

        found = [ask(0, 1.0, chunk) for chunk in chunks[1:]]
        found.append(ask(0, 1.0, chunks[-1], short, short))
        for number in range(len(prompts)):
            found.append(ask(number, 1.0, chunks[0]))
            found += [ask(number, 0.1, chunk) for chunk in chunks]
            found.append(ask(number, 0.1, chunks[-1], short, short))
        print("FOUND", json.dumps(found))
"""


def serve(folder, model, dtype, prompts, chunks):
    """First tokens of prompts by (prompt, budget, chunk, requests beside it)."""
    script = folder / "generate.py"
    script.write_text(textwrap.dedent(GENERATE))
    words = [str(model), dtype, json.dumps([WHOLE, *chunks]), json.dumps(prompts)]
    done = subprocess.run(
        [sys.executable, str(script), *words],
        capture_output=True, text=True, check=False, timeout=800, cwd=folder,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    return {(one["prompt"], one["budget"], one["chunk"], one["beside"]): one for one in found}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunking")
    write_model(folder)
    write_weights(folder, gain=1.5, rank=4)
    choose = random.Random(5).randrange
    prompts = [[choose(3, 512) for _ in range(2600)] for _ in range(PROMPTS)]
    return serve(folder, folder, "float32", prompts, CHUNKS)


def distance(one, other):
    """Total variation between two first tokens' distributions."""
    p, q = (torch.tensor(answer["logprobs"]).exp() for answer in (one, other))
    return float((p - q).abs().sum() / 2)


CUTS = pytest.mark.parametrize(
    ("chunk", "beside"), [*((chunk, 0) for chunk in CHUNKS), (CHUNKS[-1], 2)]
)  # fmt: skip


@CUTS
def test_at_budget_one_every_chunking_gives_the_same_tokens(random_model, chunk, beside):
    whole, cut = random_model[0, 1.0, WHOLE, 0], random_model[0, 1.0, chunk, beside]
    assert cut["tokens"] == whole["tokens"]
    assert cut["chunks"] == 0


@CUTS
def test_first_tokens_are_within_the_tolerance(random_model, chunk, beside):
    moved, sparsity = [], []
    for prompt in range(PROMPTS):
        dense, whole = (random_model[prompt, budget, WHOLE, 0] for budget in (1.0, 0.1))
        cut = random_model[prompt, 0.1, chunk, beside]
        assert whole["chunks"] == 1
        assert cut["chunks"] >= 2600 // chunk - 1, "the prompt was cut"
        sparsity.append(distance(whole, dense))
        moved.append(distance(cut, whole))
        assert sparsity[-1] > 0.05, "leaving tokens out is seen"
    assert sum(moved) < TOLERANCE * sum(sparsity)


def in_chunks(backend, step, size):
    """A layer's outputs for a prompt that is computed ``step`` tokens at a time."""
    (whole,) = step.rows
    parts = []
    for start in range(0, whole.queries, size):
        count = min(size, whole.queries - start)
        part = backend.part(step, start, count)
        parts.append(backend.attend(part)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_mean_queries_do_not_depend_on_the_chunk(tiny_model, size):
    from s2o_vllm.backend_cpu import S2OCPUBackend

    backend = Backend(
        S2OCPUBackend, tiny_model, heads=4, kv_heads=2, head_dim=64, page=32,
        dtype=torch.float32, device="cpu",
        settings={"ranking": "mean_query", "segment_size": 64, "min_context": 128},
    )  # fmt: skip
    step = backend.step([Row(1500, 1500)])
    wanted, plan = backend.attend(step)
    assert max(work.max_list for work in plan.work) > 100, "sparse"
    found = in_chunks(backend, step, size)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranking", ["mean_query", "low_rank"])
def test_the_share_of_all_work_does_not_depend_on_the_chunk(tiny_model, monkeypatch, ranking):
    from s2o_vllm import metrics
    from s2o_vllm.backend_cpu import S2OCPUBackend

    def shares(size):
        """Share of all work that was done, and density of the sparse path."""
        monkeypatch.setattr(metrics, "worker", metrics.WorkerCounters())
        backend = Backend(
            S2OCPUBackend, tiny_model, heads=4, kv_heads=2, head_dim=64, page=32,
            dtype=torch.float32, device="cpu",
            settings={"ranking": ranking, "segment_size": 64, "min_context": 512},
        )  # fmt: skip
        in_chunks(backend, backend.step([Row(1500, 1500)]), size)
        totals = metrics.worker.totals()
        skipped, work, visited, eligible = (
            sum(value for (metric, _), value in totals.items() if metric == f"s2o:{name}")
            for name in (
                "attention_tokens_skipped", "attention_tokens", "history_tokens_visited",
                "history_tokens_eligible",
            )
        )  # fmt: skip
        assert work == 4 * 1500 * 1501 // 2
        return 1 - skipped / work, visited / eligible

    (whole, of_sparse), (cut, of_cut) = shares(1500), shares(256)
    assert cut == pytest.approx(whole, rel=0.01), "a sample has no fixed size"
    assert 0.2 < whole < 0.5
    assert of_cut < 0.7 * of_sparse, "dense chunks are not in it"
