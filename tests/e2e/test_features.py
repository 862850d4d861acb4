"""Features of vLLM's beside sparse prefill, tried on two servers of one model with weights."""

import json
import random

import openai
import pytest
import torch
from safetensors.torch import save_file

from models import TINY_LLAMA, write_model, write_weights

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FLAGS = (
    "--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-segment-size", "128",
    "--load-format", "safetensors", "--dtype", "float32",
)  # fmt: skip
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
          "prompt_lookup_min": 1}  # fmt: skip
RANK = 8


def write_adapter(folder, base):
    """A LoRA adapter of random weights, on the queries and values of every layer."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"],
              "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    hidden, head_dim = TINY_LLAMA["hidden_size"], TINY_LLAMA["head_dim"]
    weights = {}
    for layer in range(TINY_LLAMA["num_hidden_layers"]):
        for name, heads in (("q_proj", "num_attention_heads"), ("v_proj", "num_key_value_heads")):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, hidden, generator=generator) / hidden**0.5
            up = torch.randn(TINY_LLAMA[heads] * head_dim, RANK, generator=generator) / RANK**0.5
            weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


def prompt(seed, length=1500, repeat=1):
    choose = random.Random(seed).randrange
    return [choose(3, 512) for _ in range(length // repeat)] * repeat


def ask(server, tokens, budget, model=None, **options):
    """Token ids of every answer to one prompt."""
    extra = {"return_token_ids": True, "vllm_xargs": {"s2o_sparsity_budget": budget}}
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    options = {"temperature": 0, "max_tokens": 16} | options
    extra |= options.pop("extra", {})
    answer = client.completions.create(
        model=model or server.model, prompt=tokens, extra_body=extra, **options
    )
    return [choice.token_ids for choice in answer.choices]


PROMPTS = [prompt(1), prompt(2, repeat=75)]
CASES = [(tokens, budget) for tokens in PROMPTS for budget in (1.0, 0.1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_model(folder)
    return write_weights(folder)


@pytest.fixture(scope="module")
def servers(model, launch, tmp_path_factory):
    adapter = write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", model)
    plain = (
        "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"tuned={adapter}",
        "--no-enable-prefix-caching", "--async-scheduling",
    )  # fmt: skip
    drafts = ("--speculative-config", json.dumps(DRAFTS))
    return launch(model, drafts=FLAGS + drafts, plain=FLAGS + plain)


@pytest.fixture(scope="module")
def drafted(servers):
    """Answers with speculative decoding by n-grams of the prompt, and the drafts it made."""
    one = servers["drafts"]
    answers = [ask(one, *case) for case in CASES]
    return answers, one.total("vllm:spec_decode_num_draft_tokens")


@pytest.fixture(scope="module")
def plain(servers):
    """A server with an adapter, async scheduling asked for, and no prefix cache."""
    return servers["plain"]


def test_speculative_decoding_keeps_the_tokens(plain, drafted):
    answers, drafts = drafted
    assert drafts > 0
    assert answers == [ask(plain, *case) for case in CASES]
    assert answers[0] != answers[1], "what is attended to matters"


def test_an_adapter_is_prefilled_sparsely(plain):
    tuned = {budget: ask(plain, prompt(3), budget, model="tuned") for budget in (1.0, 0.1)}
    base = {budget: ask(plain, prompt(3), budget) for budget in (1.0, 0.1)}
    assert tuned[1.0] != base[1.0]
    assert tuned[0.1] not in (base[0.1], tuned[1.0])
    assert ask(plain, prompt(3), 0.1, model="tuned") == tuned[0.1]


def test_without_a_prefix_cache_an_answer_repeats(plain):
    assert ask(plain, prompt(4), 0.1) == ask(plain, prompt(4), 0.1)
    assert plain.total("vllm:prefix_cache_hits") == 0


def test_several_samples_of_one_prompt(plain):
    # Without a seed: with one, vLLM 0.32 on a CPU ends ("CPU Generator does not use offset").
    answers = ask(plain, prompt(5), 0.1, n=3, temperature=1.0)
    assert len({tuple(tokens) for tokens in answers}) == 3


def test_guided_decoding(plain):
    (tokens,) = ask(
        plain, prompt(6), 0.1, extra={"structured_outputs": {"regex": "w1[0-9]"}}
    )  # fmt: skip
    assert tokens[0] in range(10, 20)
    assert tokens[1:] == [TINY_LLAMA["eos_token_id"]]
