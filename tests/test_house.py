"""Rules of the house that a parser can check."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A place in a table that kernels read, by number where `kernels/layout.py` has a name.
BY_NUMBER = re.compile(
    r"\b(p_item|p_segment|ITEM_COLUMNS|SEGMENT_COLUMNS|p_counters|p_append|p_span) \+ \d"
)


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize(("folder", "foreign"), [("kernels", "vllm"), ("s2o_vllm", "triton")])
def test_each_side_keeps_to_its_library(folder, foreign):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    assert [path.name for path in files if foreign in imported(path)] == []


def test_kernels_name_the_columns_of_tables():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert any("p_segment + HISTORY" in path.read_text() for path in files), (
        "the pattern still fits"
    )
    assert [path.name for path in files if BY_NUMBER.search(path.read_text())] == []


def test_one_module_knows_of_research():
    """A wheel has no `benchmarks/research`: what it holds must do without."""
    others = [
        ROOT / "s2o_vllm",
        ROOT / "deploy",
        ROOT / "benchmarks/speed",
        ROOT / "benchmarks/quality",
    ]
    files = [path for folder in others for path in folder.rglob("*.py")]
    knowing = {
        path.name for path in files if re.search(r"import.*research|\.research ", path.read_text())
    }
    assert knowing == {"methods.py"}


def test_one_module_starts_servers():
    own = ROOT / "s2o_vllm/cli/server_process.py"
    folders = [ROOT / "s2o_vllm", ROOT / "benchmarks", ROOT / "deploy", ROOT / "tests"]
    files = [path for folder in folders for path in folder.rglob("*.py") if path.parts[-2] != "cli"]
    starting = re.compile(r"Popen\(|wait_until_\w+\(server, url|\"--port\", str\(port\)")
    assert starting.search(own.read_text()), "the pattern still fits"
    allowed = {"test_counter_files.py", "test_house.py", "test_soak.py"}  # these start none
    assert {path.name for path in files if starting.search(path.read_text())} - allowed == set()


MOST_LINES, MOST_PARAMETERS = 400, 30


@pytest.mark.parametrize("folder", ["kernels", "s2o_vllm"])
def test_a_file_is_read_in_five_minutes(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def kernels():
    """Every function of `kernels/` that is launched: its file, name and number of parameters."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield path.name, node.name, len(node.args.args)


def test_a_kernel_takes_few_parameters():
    found = list(kernels())
    assert len(found) > 12
    assert [one for one in found if one[2] > MOST_PARAMETERS] == []


def test_kernels_have_names_of_their_own():
    """A trace names a kernel, and nothing else."""
    names = [name for _, name, _ in kernels()]
    assert sorted(set(names)) == sorted(names)


def module_paths() -> dict[str, Path]:
    """Return the modules of `kernels/` by name."""
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def module_graph(everywhere: bool = False, types: bool = True) -> dict[str, set[str]]:
    """Return which modules of `kernels/` each one imports.

    At its top level, for type checkers too if ``types``; with ``everywhere`` in functions as well.
    """
    modules, graph = module_paths(), {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if everywhere else tree.body
        checked = [node for node in nodes if types or not isinstance(node, ast.If)]
        bodies = [node.body if isinstance(node, ast.If) else [node] for node in checked]
        package = path.relative_to(ROOT).parent.parts
        graph[name] = set()
        for node in itertools.chain(*bodies):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = package[: len(package) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                known = {".".join((*base, alias.name)), ".".join(base)} & set(modules)
                graph[name].add(max(known, key=len))
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle, or none."""
    left = {name: set(to) for name, to in graph.items()}
    while True:
        free = [name for name, to in left.items() if not to & set(left)]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


@pytest.mark.parametrize("everywhere", [False, True], ids=["top level", "everywhere"])
def test_no_module_of_the_kernels_imports_itself_by_others(everywhere):
    graph = module_graph(everywhere)
    assert "kernels.work_list" in graph["kernels.ranking.probes"], "imports are still found"
    assert "kernels.ranking.rankings" in graph["kernels.prefill"], "those of types, too"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle(graph) == []


def test_every_command_of_the_benchmarks_can_be_run_by_its_name():
    """Each is imported first, in a separate process: a circle shows only then."""
    names = sorted(
        f"s2o_vllm.benchmarks.{path.parent.name}.{path.stem}"
        for path in (ROOT / "benchmarks").glob("*/*.py")
        if "def main(" in path.read_text()
    )
    assert "s2o_vllm.benchmarks.speed.serve" in names
    code = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        importlib.import_module(name)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        print(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [], done.stderr[-2000:]


def test_the_host_side_of_the_kernels_needs_no_triton():
    """Work lists, settings and references load where Triton is not installed."""
    graph, modules = module_graph(types=False), module_paths()
    needed, ahead = set(), {"kernels.prefill", "kernels.decode", "kernels.tiles"}
    while ahead:
        needed |= ahead
        ahead = {name for one in ahead for name in graph[one]} - needed
    assert {"kernels.work_list", "kernels.selection.reference"} <= needed
    assert [name for name in sorted(needed) if "triton" in imported(modules[name])] == []
    assert "triton" in imported(modules["kernels.columns"]), "it would be found"


# Words that `docs/glossary.md` replaced, as parts of identifiers. To fit a basis is a verb.
OLD_ANYWHERE = r"slopes?|lift|lean|beside|meanwhile|settled|rough|told|shifts?|sought|pseudo"
OLD_IN = {
    "kernels": r"|items?|spreads?|visit|rest|places|kept|images?|kinds?|asked",
    "s2o_vllm": r"|item|places|asked",
}
# And in docstrings, comments and pages, where they can mean nothing else.
OLD_PHRASES = re.compile(
    r"row shifts?|scored rows?|\bimages? of (?:a |the )?(?:keys|rows|quer)|\bslopes?\b|\bso many\b"
    r"|\b(?:is|are) told\b|[Ww]hat stands for|\bthe fits?\b|\bmeanwhile\b|\bsought\b"
)
VLLMS = {"alibi_slopes", "ALiBi slopes"}  # its words


def identifiers(path: Path) -> set[str]:
    """Return the names that a file defines or uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.add(value)
    return found


def test_names_are_the_glossarys():
    found = set()
    for folder in ("kernels", "s2o_vllm", "benchmarks", "deploy"):
        words = OLD_ANYWHERE + OLD_IN.get(folder, "")
        old = re.compile(rf"(?:^|_)(?:{words})(?:$|_)", re.IGNORECASE)
        files = sorted((ROOT / folder).rglob("*.py"))
        assert len(files) > 5
        found |= {
            (path.name, name) for path in files for name in identifiers(path) if old.search(name)
        }
    assert {one for one in found if one[1] not in VLLMS} == set()


def test_words_are_the_glossarys():
    """In what people read; the glossary alone has both."""
    folders = ("kernels", "s2o_vllm", "benchmarks", "deploy", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    pages = ("", "docs", "deploy", "benchmarks", "benchmarks/quality")
    files += [path for folder in pages for path in (ROOT / folder).glob("*.md")]
    files = [path for path in files if path.name not in ("test_house.py", "glossary.md")]
    assert len(files) > 200
    found = []
    for path in files:
        text = path.read_text()
        for words in VLLMS:
            text = text.replace(words, "")
        found += [(path.name, phrase) for phrase in OLD_PHRASES.findall(text)]
    assert found == []


SHAPES = re.compile(r"\[.+\]|any shape|(?:its own|the) shape|\b[Ss]ee |rguments are those")


def defined(body, inside=""):
    """Functions of a module or of its classes, not those inside functions; kernels left out."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            kernel = any("jit" in ast.unparse(one) for one in node.decorator_list)
            yield from [] if kernel else [(inside + node.name, node)]


def test_docstrings_of_tensors_give_shapes():
    """What takes or returns tensors names their shapes, or refers to what does."""
    found, counted = [], 0
    for folder in ("kernels", "s2o_vllm", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, node in defined(ast.parse(path.read_text()).body):
                arguments = (*node.args.args, *node.args.kwonlyargs)
                types = [one.annotation for one in arguments] + [node.returns]
                if not any(one is not None and "Tensor" in ast.unparse(one) for one in types):
                    continue
                counted += 1
                if not SHAPES.search(ast.get_docstring(node) or ""):
                    found.append((path.name, name))
    assert counted > 150
    assert found == []


def test_tuning_quotes_headings_of_the_log():
    """Each measured constant names the section that has its figures."""
    headings = re.findall(
        r"^##+ (.+)$", (ROOT / "benchmarks/quality/LOG.md").read_text(), re.MULTILINE
    )
    quoted = re.findall(r'"([^"]+)"', (ROOT / "kernels/tuning.py").read_text().split('"""', 2)[2])
    assert len(quoted) > 10
    assert [one for one in quoted if not any(head.startswith(one) for head in headings)] == []
