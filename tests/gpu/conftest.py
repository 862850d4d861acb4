"""Real servers on a GPU. Everything here is marked `gpu` and skipped without one."""

from pathlib import Path

import pytest
import torch

from models import write_model, write_weights

# Llama-3.1-8B's heads between narrow layers: prefill is its attention, and a start is quick.
NARROW = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 32768,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def narrow_llama(tmp_path_factory) -> Path:
    """A model whose answers depend on what is attended to; vLLM's dummy weights' hardly do."""
    folder = tmp_path_factory.mktemp("narrow")
    write_model(folder, **NARROW)
    write_weights(folder)
    return folder


@pytest.fixture(scope="session")
def low_rank_llama(tmp_path_factory) -> Path:
    """Two such layers, whose keys have few directions that matter, as those of trained models.

    To keys without structure no two low-rank bases are alike: in `narrow_llama` one fp16 unit in
    the last place, here and there, makes other lists and other answers.
    """
    folder = tmp_path_factory.mktemp("low_rank")
    write_model(folder, **NARROW | {"num_hidden_layers": 2})
    write_weights(folder, gain=1.5, rank=4)
    return folder
