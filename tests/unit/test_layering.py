"""The rules that keep the code readable: who imports whom, who reads the environment, how long a module is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# optimize -> fettle <- workers <- deployments; what each package may import of the others, itself always.
ALLOWED = {
    "fettle": set(),
    "workers": {"fettle"},
    "optimize": {"fettle", "workers"},
    "deployments": {"fettle", "workers"},
    "examples": {"fettle", "workers", "optimize", "deployments"},
    "benchmarks": {"fettle", "workers", "optimize", "deployments", "examples"},
}
# The doors of the product, one of them in two files, import the other packages when they are used.
DOORS = {"fettle/cli.py", "fettle/rollout_commands.py", "fettle/local.py"}
PRODUCT = ("fettle", "workers", "optimize", "deployments")
SERVERS_ONLY = {"ray", "fastapi", "starlette", "grpc"}
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript"}
# Who may touch the environment, and why.
ENVIRONMENT = {
    "deployments/server.py": "Ray reads its settings from the environment when it is imported",
    "deployments/forkserver.py": "a fork takes the environment of the process that it stands for",
}
LONGEST = 400
BROAD = {"Exception", "BaseException"}


def modules(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(*packages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", modules(*packages), ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Top-level names of what is imported anywhere below `tree`, except for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node
        else:
            yield from imports(node)


def imported_at_import(tree: ast.Module) -> set[str]:
    """What importing the module imports: all but what functions import when they run."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

    return {name for name, _ in imports(WithoutFunctions().visit(tree))}


def test_there_is_something_to_check():
    assert len(modules(*PRODUCT)) > 30
    for door in ("fettle/policy.py", "deployments/batcher.py", "workers/engine.py", "optimize/pipeline.py"):
        assert (ROOT / door).is_file()


@each(*ALLOWED)
def test_imports_go_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    foreign = {name for name, _ in imports(parse(path))} & set(ALLOWED) - {package}
    if name_of(path) in DOORS:
        assert not imported_at_import(parse(path)) & foreign, "the doors import the other packages lazily"
    else:
        assert foreign <= ALLOWED[package]


@each("fettle", "workers", "optimize")
def test_only_deployments_know_ray_and_http(path: Path):
    assert not {name for name, _ in imports(parse(path))} & SERVERS_ONLY


@each("fettle")
def test_the_contract_needs_no_model_library(path: Path):
    assert not {name for name, _ in imports(parse(path))} & HEAVY


@each("fettle", "workers", "optimize", "deployments", "examples", "benchmarks", "tests")
def test_no_relative_imports(path: Path):
    assert not [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level]


@each(*PRODUCT)
def test_the_environment_is_read_in_one_place(path: Path):
    if name_of(path) in ENVIRONMENT:
        return
    touched = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")
        and ast.unparse(node.value) == "os"
    ]
    imported = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and {a.name for a in node.names} & {"environ", "getenv"}
    ]
    assert not touched + imported


def test_the_places_that_may_read_the_environment_still_do():
    for name in ENVIRONMENT:
        assert "os.environ" in (ROOT / name).read_text(encoding="utf-8")


@each(*PRODUCT)
def test_no_module_is_longer_than_one_sitting(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@each("fettle", "workers", "optimize", "deployments", "examples", "benchmarks")
def test_every_module_says_what_it_is(path: Path):
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(parse(path))


@each(*PRODUCT, "examples", "benchmarks")
def test_no_error_is_swallowed(path: Path):
    """A handler for everything does something about it: raises, answers or at least logs; never `pass`."""
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"line {node.lineno}: a bare except"
        caught = {ast.unparse(kind) for kind in getattr(node.type, "elts", [node.type])}
        if caught & BROAD:
            idle = all(isinstance(step, ast.Pass | ast.Continue | ast.Constant) for step in node.body)
            assert not idle, f"line {node.lineno}: an error is swallowed"
    suppressed = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("suppress")
        and {ast.unparse(argument) for argument in node.args} & BROAD
    ]
    assert not suppressed


@each(*PRODUCT)
def test_nothing_is_validated_by_assert_on_what_a_user_gave(path: Path):
    """Asserts are for what the code itself guarantees; each is one comparison with None or one isinstance."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            assert "isinstance(" in text or "is not None" in text, f"line {node.lineno}: assert {text}"


@each("fettle", "workers", "deployments")
def test_importing_a_module_runs_nothing(path: Path):
    """At module level there are definitions, constants and `if __name__`; no bare call."""
    calls = [node for node in parse(path).body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls
