"""The rooms import only what the house allows, and the package keeps its promises about itself."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "leanseek"

# Room -> rooms it may import. errors, config and reading are free to all. An order: nothing imports what comes after it.
ALLOWED = {
    "machine": set(),
    "ops": {"machine"},
    "native": {"machine", "ops"},
    "gpu": {"machine", "ops"},
    "model": {"machine", "ops"},
    "fp8": {"ops", "gpu", "model"},
    "planning": set(),
    "checkpoint": {"machine", "ops", "model"},
    "data": {"machine"},
    "training": {"machine", "ops", "fp8", "model", "checkpoint", "data", "planning"},
    "distributed": {"machine", "ops", "fp8", "model", "checkpoint", "data", "planning", "training"},
    "backends": {"machine", "ops", "native", "model", "checkpoint"},
    "engine": {"machine", "ops", "checkpoint", "backends"},
    "server": {"engine"},
    "evaluation": {"engine"},
    "posttraining": {
        "machine", "ops", "fp8", "model", "checkpoint", "data", "training", "backends", "engine", "server", "evaluation",
    },
    "bench": {
        "machine", "ops", "native", "gpu", "fp8", "model", "checkpoint", "data", "planning", "training", "backends",
        "engine",
    },
    "reproduce": {
        "machine", "ops", "model", "checkpoint", "data", "planning", "training", "backends", "engine", "evaluation", "bench",
    },
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_rooms_import_only_what_they_may() -> None:
    for path in FILES:
        own = room(path)
        if own not in ALLOWED:
            continue  # config, errors, cli, the package itself
        used = {name.split(".")[1] for name in imports(path) if name.startswith("leanseek.")}
        rooms = {name for name in used if (PACKAGE / name).is_dir()}
        assert rooms <= ALLOWED[own] | {own}, path


def test_rooms_stand_in_an_order() -> None:
    rooms = list(ALLOWED)
    for place, (own, may) in enumerate(ALLOWED.items()):
        assert may <= set(rooms[:place]), own


def test_no_module_imports_itself_through_others() -> None:
    """Imports at module level, type checking aside, form no circle."""
    graph = {_module(path): _loaded(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, set())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _loaded(path: Path) -> set[str]:
    """Modules of the package that importing a file imports; a name of a package is the package, unless a module."""
    found: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if _is_module(inner) else node.module)
    return {name for name in found if name.startswith("leanseek.") and name != _module(path)}


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_no_pickle_and_no_transformers_in_the_package() -> None:
    for path in FILES:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"transformers", "pickle", "dill", "joblib"}, path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_no_file_is_longer_than_500_lines() -> None:
    assert not [path for path in FILES if path.read_text(encoding="utf-8").count("\n") > 500]


def test_text_has_an_encoding() -> None:
    """Else it is the locale's, and a folder written here cannot be read there."""
    for path in FILES:
        assert not list(_without_encoding(parsed(path))), path


@pytest.mark.parametrize(
    "call",
    [
        *(
            "open(p)",
            "open(p, 'w')",
            "p.open()",
            "p.open('a')",
            "p.read_text()",
            "p.write_text('x')",
            "open(p, mode='r')",
        ),
        *("run(c, text=True)", "subprocess.Popen(c, universal_newlines=True)", "TemporaryFile('w+')"),
        "tempfile.NamedTemporaryFile(mode='w')",
    ],
)
def test_calls_without_an_encoding_are_seen(call: str) -> None:
    assert list(_without_encoding(ast.parse(call)))
    assert not list(_without_encoding(ast.parse(call[:-1] + ("" if call[-2] == "(" else ", ") + "encoding='utf-8')")))
    assert not list(_without_encoding(ast.parse("open(p, 'rb'); p.open('wb'); read_text(p); os.open(p, 0)")))
    assert not list(
        _without_encoding(ast.parse("run(c); TemporaryFile(); NamedTemporaryFile('w+b'); run(c, text=False)"))
    )


def _without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        given = {k.arg: k.value for k in node.keywords}
        if method and name in ("read_text", "write_text"):
            yield node.lineno
        if any(isinstance(v := given.get(k), ast.Constant) and v.value for k in ("text", "universal_newlines")):
            yield node.lineno  # a subprocess
        temporary = name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile")
        if name != "open" and not temporary:
            continue
        place = 0 if method or temporary else 1
        mode = node.args[place] if len(node.args) > place else given.get("mode")
        if mode is None and not temporary and not (method and node.args):
            yield node.lineno
        if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value:
            yield node.lineno


def test_every_room_of_the_package_is_known() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert rooms == set(ALLOWED) | {"cli"}


def test_the_walk_through_the_code_names_what_is_there() -> None:
    text = (ROOT / "docs/a-token.md").read_text(encoding="utf-8")
    stops = re.findall(r"`([\w/]+\.(?:py|cpp))`((?:,? `\w+`)+)", text)
    assert len(stops) > 30
    for file, names in stops:
        source = (PACKAGE / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(?:def|class|KERNEL) {name}\b", source), (file, name)


def test_help_does_not_wait_for_torch() -> None:
    """Command modules import their rooms inside their functions."""
    for path in (PACKAGE / "cli").glob("*.py"):
        top = {n for node in ast.parse(path.read_text(encoding="utf-8")).body for n in _names(node)}
        assert not any(n.split(".")[0] in ("torch", "numpy") for n in top), path


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {a.name for a in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
