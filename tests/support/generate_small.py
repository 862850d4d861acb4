"""Answers of small random models, stock and through S2O (run as a script, on vLLM's CPU build).

Takes a JSON file of model folders by name. Prints ``FOUND {...}`` for each name and backend:
``answers``, new tokens and the log-probabilities of the prompt's, by budget; of S2O also
``visited``, the tokens visited and eligible by budget in each layer that goes sparse, and
``dense``, chunks by reason. Stock answers come first: by then nothing has asked for S2O in this
process.
"""

import json
import os
import random
import sys
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers, in this process

import torch
from examine import import_here
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

PROMPT_TOKENS, CHUNK = 1500, 512
BUDGETS = (1.0, 0.9999, 0.1)
# Of weights by parts of their names: attention has peaks, and adds much to the residual stream.
GAINS = {"qkv": 2, "q_proj": 2, "k_proj": 2, "o_proj": 8}
NO_PICTURES = {"image": 0, "video": 0}
SETTINGS = {"min_context": 256, "segment_size": 64}


def load_weights(loader: DummyModelLoader, model: torch.nn.Module, config: object) -> None:
    """Draw weights with which attention matters: vLLM's own dummy weights are too small."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        own = name.split(".")[-1]
        if own == "sinks":
            weight.data.copy_(torch.linspace(2, 9, len(weight)))
        elif own == "A":  # the decay of a Mamba layer, negative
            weight.data.fill_(-1)
        elif weight.dim() > 1 and "bias" not in own:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1)
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(gain * drawn / weight.shape[-1] ** 0.5)
        else:
            weight.data.fill_("norm" in name)


def answer(llm: LLM, **extra: float) -> tuple[list[int], list[float]]:
    """Return greedy tokens after a random prompt, and the log-probabilities of the prompt's own."""
    choose = random.Random(1).randrange
    prompt = {"prompt_token_ids": [choose(3, 512) for _ in range(PROMPT_TOKENS)]}
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0, extra_args=extra
    )
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    steps = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    prompt_logprobs = [step[token].logprob for token, step in steps if step is not None]
    return list(output.outputs[0].token_ids), prompt_logprobs


def counted(llm: LLM) -> torch.Tensor:
    """Return the tokens visited and eligible in each layer that can go sparse: ``[layers, 2]``."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    impls = [getattr(layer, "impl", None) for layer in layers.values()]
    found = torch.zeros(len(impls), 2, dtype=torch.int64)
    for row, impl in zip(found, impls, strict=True):
        if getattr(impl, "_s2o_counters", None) is not None:
            row += impl._s2o_counters[:2]
    return found[[getattr(impl, "s2o_reason", "not ours") is None for impl in impls]]


def generate(folder: str, sparse: bool) -> dict:
    """Start a model and ask it, at every budget if it is S2O's."""
    config = json.loads((Path(folder) / "config.json").read_text())
    ours = {"attention_backend": "s2o", "additional_config": {"s2o": SETTINGS}} if sparse else {}
    llm = LLM(
        folder, enforce_eager=True, max_model_len=2048, max_num_batched_tokens=CHUNK,
        load_format="dummy", dtype=config["torch_dtype"], enable_prefix_caching=False,
        limit_mm_per_prompt=NO_PICTURES if "vision_config" in config else None, **ours,
    )  # fmt: skip
    try:
        if not sparse:
            return {"answers": {"stock": answer(llm)}}
        from s2o_vllm import metrics

        found: dict = {"answers": {}, "visited": {}, "dense": {}}
        for budget in BUDGETS:
            visited, dense = counted(llm), metrics.worker.totals()
            found["answers"][budget] = answer(llm, s2o_sparsity_budget=budget)
            found["visited"][budget] = (counted(llm) - visited).tolist()
            found["dense"][budget] = {
                reason: count
                for (name, reason), count in (metrics.worker.totals() - dense).items()
                if name == "s2o:dense_rows"
            }
        return found
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def main(path: str) -> None:
    """Ask each model of a file."""
    DummyModelLoader.load_weights = load_weights
    folders = json.loads(Path(path).read_text())
    for folder in folders.values():
        import_here(folder)
    for backend in ("stock", "s2o"):
        for name, folder in folders.items():
            try:
                found = generate(folder, backend == "s2o")
            except Exception:  # the others' answers are worth having
                found = {"error": traceback.format_exc()}
            print("FOUND", json.dumps({"name": name, "backend": backend, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
