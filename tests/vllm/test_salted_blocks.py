"""Blocks that no setting touches are shared between budgets, all others are not."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

from backends import Backend, Row
from s2o_vllm import salted_blocks
from s2o_vllm.config import S2OConfig
from s2o_vllm.requests import cache_salt

BLOCK = 16
SERVER = S2OConfig(sparsity_budget=0.1, min_context=64)


@pytest.fixture(autouse=True)
def _vllms_own(monkeypatch):
    """vLLM's functions as they are in a fresh process, and again after each test."""
    for module in map(salted_blocks.loaded, salted_blocks.NAMING):
        if module is not None:
            monkeypatch.setattr(
                module, "generate_block_hash_extra_keys",
                kv_cache_utils.generate_block_hash_extra_keys,
            )  # fmt: skip


@pytest.fixture
def hash_blocks(_vllms_own):
    kv_cache_utils.init_none_hash(repr)

    def hash_function(value):
        return repr(value).encode()

    return salted_blocks._hasher(kv_cache_utils.get_request_block_hasher, BLOCK, hash_function)


def request(salt, tokens=200):
    ids = list(range(tokens))
    return SimpleNamespace(
        cache_salt=salt, num_tokens=tokens, all_token_ids=ids, block_hashes=[], mm_features=[],
        lora_request=None, prompt_embeds=None,
    )  # fmt: skip


def shared_blocks(hash_blocks, one, other):
    """How many blocks at the start two salts share."""
    pairs = list(zip(hash_blocks(request(one)), hash_blocks(request(other)), strict=True))
    assert len(pairs) == 200 // BLOCK
    same = [a == b for a, b in pairs]
    count = same.index(False) if False in same else len(same)
    assert not any(same[count:])
    return count


def salted(budget=0.1, salt=None, server=SERVER, **more):
    return cache_salt(salt, server, {"sparsity_budget": budget} | more)


@pytest.mark.parametrize(
    ("min_context", "shared"),
    [(64, 4), (63, 3), (65, 4), (16, 1), (15, 0), (0, 0), (8192, 12)],
)
def test_budgets_share_the_blocks_before_min_context_and_no_other(hash_blocks, min_context, shared):
    server = S2OConfig(min_context=min_context)
    found = shared_blocks(hash_blocks, salted(0.1, server=server), salted(0.2, server=server))
    assert found == shared


def test_the_same_budget_shares_everything(hash_blocks):
    assert shared_blocks(hash_blocks, salted(0.3), salted(0.3)) == 12
    assert shared_blocks(hash_blocks, salted(0.3), salted(0.3, target_error=0.1)) == 4


def test_a_budget_of_one_shares_with_none_but_its_like(hash_blocks):
    assert shared_blocks(hash_blocks, salted(1.0), salted(0.1)) == 0
    assert shared_blocks(hash_blocks, salted(1.0), salted(1.0)) == 12


@pytest.mark.parametrize(
    "mine",
    ["tenant", "|s2o:prefix", "|s2o:prefix@64:x", "|s2o:dense", salted(0.1), salted(0.2)],
)
@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_no_tenant_reaches_anothers_blocks(hash_blocks, mine, budget):
    for other in (None, "other", mine + "x"):
        for theirs in (0.1, 0.2, 1.0):
            assert shared_blocks(hash_blocks, salted(budget, mine), salted(theirs, other)) == 0


def test_a_request_that_is_not_ours_is_hashed_as_vllm_does(hash_blocks):
    own = kv_cache_utils.get_request_block_hasher(BLOCK, lambda value: repr(value).encode())
    for salt in (None, "tenant"):
        assert hash_blocks(request(salt)) == own(request(salt))


def test_later_tokens_are_hashed_on_from_where_it_ended(hash_blocks):
    """An answer's blocks are hashed as it grows."""
    whole = hash_blocks(request(salted(0.1)))
    growing = request(salted(0.1), 40)
    growing.block_hashes = hash_blocks(growing)
    assert growing.block_hashes == whole[:2]
    growing.num_tokens, growing.all_token_ids = 200, list(range(200))
    assert growing.block_hashes + hash_blocks(growing) == whole


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
@pytest.mark.parametrize("ranking", ["low_rank", "mean_query"])
def test_outputs_before_min_context_are_the_same_to_the_bit_whatever_the_budget(
    tiny_model, ranking
):
    """What the sharing rests on: keys and values above come from these outputs."""
    from s2o_vllm.backend_cpu import S2OCPUBackend

    def outputs(budget):
        backend = Backend(
            S2OCPUBackend, tiny_model, heads=4, kv_heads=2, head_dim=64, page=32,
            dtype=torch.float32, device="cpu",
            settings={"ranking": ranking, "segment_size": 64, "min_context": 200,
                      "sparsity_budget": budget},
        )  # fmt: skip
        torch.manual_seed(3)
        return backend.attend(backend.step([Row(1500, 1500)]))[0]

    low, high = outputs(0.05), outputs(0.6)
    assert torch.equal(low[:200], high[:200])
    assert not torch.equal(low[300:], high[300:])
