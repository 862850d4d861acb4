"""The pages build as a site in which every link leads somewhere, and which loads nothing."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")


@pytest.fixture
def build():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(build, tmp_path, monkeypatch):
    """Build a site from the pages as ``change`` leaves them."""

    def make(change=lambda folder: None):
        stage = build.stage
        monkeypatch.setattr(build, "stage", lambda folder: (stage(folder), change(folder)))
        assert build.main(["--site", str(tmp_path)]) == 0
        return tmp_path

    return make


def test_every_page_is_built_and_loads_nothing_from_elsewhere(build, site):
    folder = site()
    for page in build.pages():
        name = "" if page.name == "README.md" and len(page.parts) == 1 else page.with_suffix("")
        html = folder / str(name).removesuffix("README") / "index.html"
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"([^\"]+)", html.read_text())
        assert loaded
        assert [one for one in loaded if "://" in one] == []


def test_every_page_is_in_the_contents(build):
    text = (ROOT / "docs/mkdocs.yml").read_text().partition("\nnav:")[2]
    named = {
        path
        for part in yaml.safe_load("nav:" + text)["nav"]
        for value in part.values()
        for path in (
            [value] if isinstance(value, str) else [name for one in value for name in one.values()]
        )
    }
    assert named == {str(page) for page in build.pages()}


@pytest.mark.parametrize("link", ["nowhere.md", "docs/settings.md#no-such-heading"])
def test_a_link_that_leads_nowhere_ends_the_build(site, link):
    from mkdocs.exceptions import Abort

    def break_it(folder):
        with (folder / "README.md").open("a") as file:
            file.write(f"\n[somewhere]({link})\n")

    with pytest.raises(Abort):
        site(break_it)
