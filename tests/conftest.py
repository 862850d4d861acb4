"""What all tests share."""

import os
import zlib

import hypothesis
import pytest
import torch

from models import write_model

# The same examples in every run, few of them; `HYPOTHESIS_PROFILE=fresh` draws others.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, max_examples=100, deadline=None, database=None
)
hypothesis.settings.register_profile("fresh", max_examples=1000, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Read when a kernel is defined, so set before anything imports one. bf16 dots are silently
# wrong there: see tests/support/cases.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Tests, and the servers that they start, are of the sparse path, which a CPU leaves alone.
    os.environ.setdefault("S2O_DENSE_WHERE_FASTER", "false")

# A test machine has little memory to give to a KV cache, and no hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model(tmp_path):
    return lambda **changes: write_model(tmp_path, **changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


# Compiling for an architecture takes 10 to 20 s; `make test` does so for the one that is tuned.
ARCHITECTURES, TUNED = "test_compile.py::test_compiles_and_fits[", "(90, 'bfloat16')"


def pytest_addoption(parser):
    parser.addoption(
        "--seed", default="0", help="of random inputs: a number (default: 0), or fresh to draw one"
    )


def pytest_configure(config):
    given = getattr(config, "workerinput", {})  # of pytest-xdist: all processes share one seed
    if "seed" in given:
        config.option.seed = given["seed"]
    elif config.option.seed == "fresh":
        config.option.seed = str(int.from_bytes(os.urandom(4), "little"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"inputs: --seed {config.option.seed}"


def pytest_collection_modifyitems(items):
    for item in items:
        if ARCHITECTURES in item.nodeid and TUNED not in item.nodeid:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def fresh_seed(pytestconfig):
    """Seed random inputs by the run's seed and a name; a failing test prints both."""

    def draw(name=""):
        torch.manual_seed(zlib.crc32(f"{pytestconfig.option.seed} {name}".encode()))
        print(f"inputs: --seed {pytestconfig.option.seed}")

    return draw


@pytest.fixture(autouse=True)
def _inputs_of_its_own(fresh_seed, request):
    """A test's random inputs depend on the seed and its name, and on no other test."""
    fresh_seed(request.node.nodeid)
