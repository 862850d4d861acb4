"""Reads what a release of vLLM defines out of its source, without importing it.

CUDA-only modules cannot be imported without a GPU, and two releases cannot be installed side by
side; both can be parsed.
"""

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
REQUIREMENT = re.compile(r"(?P<owner>\w+)(?:\.(?P<member>\w+))?(?:\((?P<parameters>.*)\))?")


class Release:
    """The source of one release: a wheel, or a folder that holds the package ``vllm``."""

    def __init__(self, path: Path):
        self.path = path
        self._archive = zipfile.ZipFile(path) if path.is_file() else None
        self._trees: dict[str, ast.Module | None] = {}

    def _read(self, name: str) -> str | None:
        if self._archive is None:
            file = self.path / name
            return file.read_text(encoding="utf-8") if file.is_file() else None
        try:
            return self._archive.read(name).decode()
        except KeyError:
            return None

    def module(self, name: str) -> ast.Module | None:
        """Return the parsed module of that dotted name, or None."""
        if name not in self._trees:
            path = name.replace(".", "/")
            texts = (self._read(file) for file in (f"{path}.py", f"{path}/__init__.py"))
            text = next((text for text in texts if text is not None), None)
            self._trees[name] = None if text is None else ast.parse(text)
        return self._trees[name]

    def find(self, module: str, symbol: str) -> tuple[str, ast.AST] | None:
        """Return the module and the node that define a symbol, following imports, or None."""
        tree = self.module(module)
        found = None
        for name, node in _bindings(tree.body) if tree else ():
            if name == symbol:
                found = node  # the last binding wins
        if found is None:
            inner = self.module(f"{module}.{symbol}")
            return (f"{module}.{symbol}", inner) if inner else None
        if not isinstance(found, ast.ImportFrom):
            return module, found
        original = next(a.name for a in found.names if (a.asname or a.name) == symbol)
        return self.find(self._absolute(module, found), original)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        """Return the dotted name of the module that an import statement of ``module`` names."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self._read("/".join([*parts, "__init__.py"])) is not None
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def member(self, module: str, owner: ast.ClassDef, name: str) -> ast.AST | None:
        """Return what defines a member of a class or of a base of it, or None."""
        for found, node in _members(owner):
            if found == name:
                return node
        for base in owner.bases:
            base = base.value if isinstance(base, ast.Subscript) else base  # Base[T]
            place = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if place and isinstance(place[1], ast.ClassDef):
                node = self.member(place[0], place[1], name)
                if node is not None:
                    return node
        return None

    def fields(self, module: str, name: str) -> set[str]:
        """Return the fields of a dataclass, those of its bases left out."""
        place = self.find(module, name)
        assert place, f"{module} has no {name}"
        body = place[1].body if isinstance(place[1], ast.ClassDef) else []
        return {n.target.id for n in body if isinstance(n, ast.AnnAssign)}

    def lacks(self, module: str, requirement: str) -> str | None:
        """Return one sentence that names what is missing, or None if the release has it.

        Args:
            module: dotted name.
            requirement: ``Name``, ``Class.member``, either with a list of parameters in
                brackets (ending in ``...`` if more may follow), or a quoted string that the
                module must contain as a constant.
        """
        tree = self.module(module)
        if tree is None:
            return f"there is no module {module}"
        if requirement.startswith("'"):
            constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            text = requirement.strip("'")
            return None if text in constants else f"{module} does not contain {text!r}"
        match = REQUIREMENT.fullmatch(requirement)
        assert match, f"malformed requirement {requirement!r}"
        owner, member, parameters = match["owner"], match["member"], match["parameters"]
        place = self.find(module, owner)
        if place is None:
            return f"{module} has no {owner}"
        node: ast.AST | None = place[1]
        if member:
            inside = isinstance(node, ast.ClassDef)
            node = self.member(place[0], node, member) if inside else None
            if node is None:
                return f"{owner} of {module} has no {member}"
        if parameters is None:
            return None
        name = f"{owner}.{member}" if member else owner
        if not isinstance(node, FUNCTIONS):
            return f"{name} of {module} is no function"
        wanted = [word.strip() for word in parameters.split(",") if word.strip()]
        found = _parameters(node)
        shown = [*found[: len(wanted) - 1], "..."] if wanted[-1:] == ["..."] else found
        if shown == wanted:
            return None
        return f"{name} of {module} takes ({', '.join(found)}), must be ({parameters})"


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements bind, those inside ``if`` and ``try`` included."""
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.If):
            yield from _bindings(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _bindings(node.body + node.orelse + node.finalbody)
            for handler in node.handlers:
                yield from _bindings(handler.body)


def _members(owner: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Names in a class's body, and those that its methods assign to ``self``."""
    yield from reversed(list(_bindings(owner.body)))  # the last binding wins
    for node in ast.walk(owner):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                of_name = isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)
                if of_name and part.value.id == "self":
                    yield part.attr, node


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])
