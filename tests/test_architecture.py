"""The shape of the house: imports point one way, and torch models are known in one folder only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGES = {"packllm", "packllm_eval"}


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports anywhere in it: under TYPE_CHECKING and within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    # `from a import b` is an import of a.b where that is a module, else of a.
    exact = {name for name in names if name in known}
    return {name for name in exact if not any(other.startswith(name + ".") for other in exact)}


def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imported(path, set(paths)) - {name} for name, path in paths.items()}


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A chain of modules that ends where it begins, if there is one."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := visit(name, []))), None)


def test_the_check_finds_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_make_no_circle():
    edges = graph()
    assert len(edges) > 60
    assert any("packllm.engines.base" in found for found in edges.values())  # imports are seen
    assert circle(edges) is None


def test_the_core_does_not_know_the_evaluation():
    for name, found in graph().items():
        if name.startswith("packllm.") and name != "packllm.cli":
            assert not [other for other in found if other.startswith("packllm_eval")], name


@pytest.mark.parametrize("what", ["AutoModel", "DynamicCache", "past_key_values", "get_decoder"])
def test_only_one_folder_knows_torch_models(what):
    knowing = {name for name, path in modules().items() if what in path.read_text()}
    assert knowing
    assert {name for name in knowing if name.startswith("packllm.")} <= {
        name for name in knowing if name.startswith("packllm.engines.transformers")
    }
