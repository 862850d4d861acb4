"""The pages say what the code has: settings, metrics, files and links."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from s2o_vllm.config import S2OConfig
from s2o_vllm.metrics import INFO, METRICS
from s2o_vllm.support import DENSE_REASONS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy/README.md"])
REPORTS = sorted(ROOT.glob("benchmarks/**/*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:tests|kernels|s2o_vllm|benchmarks|deploy|docs)/[\w/.-]+)`")
MODULE = re.compile(r"python -P? ?-m s2o_vllm\.benchmarks\.([\w.]+)")
RESULT = re.compile(r"`(\w+\.json)`")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("name", names([*PAGES, *REPORTS]))
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", names(PAGES))
def test_files_that_are_named_are_there(name):
    text = (ROOT / name).read_text()
    assert [path for path in FILE.findall(text) if not (ROOT / path).exists()] == []
    modules = [ROOT / "benchmarks" / path.replace(".", "/") for path in MODULE.findall(text)]
    assert [path for path in modules if not path.with_suffix(".py").exists()] == []


def test_the_pattern_of_links_and_files_still_fits():
    assert any(LINK.search(page.read_text()) for page in PAGES)
    assert sum(len(FILE.findall(page.read_text())) for page in PAGES) > 30


def test_result_files_that_pages_quote_are_committed():
    quoted = {name for page in PAGES for name in RESULT.findall(page.read_text())}
    assert "fidelity.json" in quoted
    changelog = set(RESULT.findall((ROOT / "CHANGELOG.md").read_text()))
    there = {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert quoted - changelog - there == set()


def test_the_table_of_settings_has_every_one_with_its_default():
    table = (ROOT / "docs/settings.md").read_text()
    rows = dict(re.findall(r"^\| `--s2o-[^|]*\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.M))
    shown = {
        key: "none" if value == () else str(value).lower() if isinstance(value, bool) else value
        for key, value in asdict(S2OConfig()).items()
    }
    assert rows == {
        key: f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in shown.items()
    }
    flags = set(re.findall(r"^\| `--s2o-([a-z-]+)", table, re.M))
    assert flags == {key.replace("_", "-") for key in shown}


def test_the_table_of_metrics_has_every_one():
    table = (ROOT / "docs/metrics.md").read_text()
    assert set(re.findall(r"(s2o:\w+)_total", table)) == set(METRICS)
    (labels,) = re.findall(rf"`{INFO}{{([^}}]+)}}`", table)
    assert labels.split(", ") == ["version", *S2OConfig().summary]


def test_the_table_of_reasons_has_every_one():
    table = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", table, re.M)
    assert rows == list(DENSE_REASONS)


def test_the_logs_contents_name_every_section():
    text = (ROOT / "benchmarks/quality/LOG.md").read_text()
    heads = [head for head in re.findall(r"^## (.+)$", text, re.M) if head != "Contents"]
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    assert [one for one in anchors if one not in linked] == ["how-to-read-the-figures"]
    assert [one for one in linked if one not in anchors] == []
