"""Build the site of these pages: ``make docs``, into build/site; ``--serve`` shows it instead.

MkDocs wants all pages below one folder, and links of the pages lead to README, reports and files
beside docs/ as GitHub shows them. So what is a page, and what a page links to, is copied into a
folder with the same paths, where every link must lead somewhere.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/quality/*.md", "deploy/README.md")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"")
PAGES_FOLDER = "S2O_DOCS_PAGES"  # the variable by which mkdocs.yml knows the folder
LARGEST = 4 * 2**20  # bytes of a file that a page links to


def pages() -> list[Path]:
    """Return the pages, as paths from the root of the repository."""
    return sorted({path.relative_to(ROOT) for glob in PAGES for path in ROOT.glob(glob)})


def linked(page: Path) -> set[Path]:
    """Return the files that a page links to, as paths from the root; folders are none."""
    found = set()
    for groups in LINK.findall((ROOT / page).read_text()):
        target = next(filter(None, groups))
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (ROOT / page.parent / target).resolve()
        if path.is_file() and path.is_relative_to(ROOT) and path.stat().st_size <= LARGEST:
            found.add(path.relative_to(ROOT))
    return found


def stage(folder: Path) -> None:
    """Copy the pages and what they link to into a folder."""
    for path in {*pages(), *(target for page in pages() for target in linked(page))}:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)


def main(arguments: list[str] | None = None) -> int:
    """Build the site; a broken link ends it with exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", action="store_true", help="show it on port 8000, and stay")
    parser.add_argument("--site", default=str(ROOT / "build/site"), help="where it is built")
    options = parser.parse_args(arguments)
    try:
        from mkdocs.__main__ import cli
    except ImportError:
        print("docs: needs mkdocs-material: pip install '.[dev]'", file=sys.stderr)
        return 2
    config = ["--config-file", str(ROOT / "docs/mkdocs.yml")]
    build = ["build", "--strict", "--clean", "--site-dir", options.site, *config]
    with tempfile.TemporaryDirectory(prefix="s2o-docs-") as folder:
        stage(Path(folder))
        os.environ[PAGES_FOLDER] = folder
        return cli(["serve", *config] if options.serve else build, standalone_mode=False) or 0


if __name__ == "__main__":
    sys.exit(main())
