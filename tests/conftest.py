"""What all tests share."""

import os

import pytest

from models import write_model

# A test machine has little memory to give to a KV cache, and no hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model(tmp_path):
    return lambda **changes: write_model(tmp_path, **changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))
