"""vLLM in this process's children, without a server: beam search, and plug-ins kept out."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.e2e

LLM = """
    import json, os, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker's counters, in this process
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    def start(**more):
        return LLM(
            sys.argv[1], enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
            load_format="dummy", enable_prefix_caching=False, gpu_memory_utilization=0.2, **more
        )

    prompt = {"prompt_token_ids": [3 + i % 500 for i in range(900)]}
"""
BEAMS = """
    def search(asked):
        params = BeamSearchParams(beam_width=2, max_tokens=2)
        if asked:
            params.extra_args = asked
        before = metrics.worker.totals()["s2o:sparse_requests", ""]
        llm.beam_search([prompt], params)
        return metrics.worker.totals()["s2o:sparse_requests", ""] - before

    if __name__ == "__main__":
        settings = {"min_context": 256, "segment_size": 128}
        llm = start(attention_backend="s2o", additional_config={"s2o": settings})
        from s2o_vllm import metrics
        key = "s2o_sparsity_budget"
        found = {"default": search({}), "dense": search({key: 1.0}), "after": search({})}
        try:
            search({key: "lots"})
        except VLLMValidationError as error:
            found["refused"] = str(error)
        print(json.dumps(found))
"""
PLAIN = """
    if __name__ == "__main__":
        llm = start()
        out = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0))[0].outputs[0]
        ours = sorted(name for name in sys.modules if name.partition(".")[0] == "s2o_vllm")
        print(json.dumps({"tokens": list(out.token_ids), "loaded": ours}))
"""
SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
BUDGET = ("--s2o-sparsity-budget", "0.1")


def python(*words, allowed=None):
    variables = os.environ | ({} if allowed is None else {"VLLM_PLUGINS": allowed})
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, check=False, timeout=400, env=variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("offline")
    for name, body in (("beams", BEAMS), ("plain", PLAIN)):
        (folder / f"{name}.py").write_text(textwrap.dedent(LLM) + textwrap.dedent(body))
    beams, plain = str(folder / "beams.py"), str(folder / "plain.py")
    words = {
        "beams": ((beams, tiny_model), None),
        "stock": ((plain, tiny_model), ""),
        "kept out": ((plain, tiny_model), "lora"),
        "installed": ((plain, tiny_model), None),
        "flag": ((*SERVE, tiny_model, *BUDGET), "lora"),
        "backend": ((*SERVE, tiny_model, "--attention-backend", "s2o"), "lora"),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(python, *own, allowed=of) for name, (own, of) in words.items()}


def printed(run):
    done = run.result()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_beam_search_runs_at_the_budget_that_it_asks_for(runs):
    found = printed(runs["beams"])
    assert found["default"] > 0
    assert found["dense"] == 0
    assert found["after"] == found["default"], "the next search asks for nothing"
    assert "s2o_sparsity_budget is 'lots', must be a number" in found["refused"]


def test_without_our_backend_answers_are_stocks(runs):
    stock, kept_out, installed = (
        printed(runs[name]) for name in ("stock", "kept out", "installed")
    )
    assert stock == {"tokens": stock["tokens"], "loaded": []}
    assert kept_out == stock, "an allow-list without us loads nothing of ours"
    assert installed["tokens"] == stock["tokens"]
    assert "s2o_vllm.plugin" in installed["loaded"]
    assert not [name for name in installed["loaded"] if "kernels" in name or "backend" in name]


def test_a_flag_of_a_plug_in_that_is_kept_out_is_refused_in_a_sentence(runs):
    done = runs["flag"].result()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("error: unrecognized arguments: --s2o-sparsity-budget 0.1")


def test_the_name_of_a_plug_in_that_is_kept_out_is_unknown(runs):
    """These are vLLM's words: none of our code may run. `s2o serve` says more."""
    done = runs["backend"].result()
    assert done.returncode != 0
    assert "Unknown attention backend: 'S2O'" in done.stderr.strip().splitlines()[-1]
