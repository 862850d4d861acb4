"""The batch by which eager servers warm up, through vLLM's first model runner on a CPU."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from models import write_weights

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

START = """
    import json, os, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers, in this process
    from types import SimpleNamespace
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        llm = LLM(
            sys.argv[1], enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
            max_num_seqs=int(sys.argv[2]), attention_backend="s2o", dtype="float32",
            additional_config={"s2o": {"min_context": 256}},
        )
        from s2o_vllm import compat, metrics, worker_hooks
        from s2o_vllm.forward import SparseImpl

        def answer():
            params = SamplingParams(temperature=0, max_tokens=4)
            (answer,) = llm.generate({"prompt_token_ids": list(range(3, 203))}, params)
            return answer.outputs[0].token_ids

        warmed, before = [], answer()

        def warm_up(self, query, kv_cache, attn_metadata, dtype):
            if self._s2o_cold_here:
                self._s2o_warm, self._s2o_cold_here = True, False
                warmed.append([*query.shape, attn_metadata.block_table.shape[0]])

        SparseImpl._s2o_cold_here, SparseImpl.warm_up = True, warm_up
        config = llm.llm_engine.vllm_config
        worker = SimpleNamespace(vllm_config=config, model_runner=compat.requests.runner_v1)
        cold = len(worker_hooks.cold_layers(config))
        counts = metrics.worker.totals()
        worker_hooks._kernel_warmup(lambda worker: None, worker)
        found = {
            "cold": [cold, len(worker_hooks.cold_layers(config))], "warmed": warmed,
            "counted": metrics.worker.totals() != counts, "same": answer() == before,
        }
        print("FOUND", json.dumps(found))
"""


@pytest.mark.parametrize(("requests", "tokens"), [(8, 8), (64, 16)])
def test_every_layer_sees_a_batch_with_attention(tmp_path, make_model, requests, tokens):
    """Nothing of it is counted, and the cache keeps what it holds."""
    model = write_weights(Path(make_model()))
    script = tmp_path / "start.py"
    script.write_text(textwrap.dedent(START))
    done = subprocess.run(
        [sys.executable, str(script), model, str(requests)],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-1000:] + done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("FOUND ")) == {
        "cold": [2, 0], "warmed": [[tokens, 4, 64, tokens]] * 2, "counted": False, "same": True,
    }  # fmt: skip
