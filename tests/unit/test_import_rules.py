"""The import rules of ARCHITECTURE.md, read off the syntax trees of all our files."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "data_prep", "eval")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# file or folder -> modules that only it, and the others named with the same modules, may import
ENGINE = {"pipeline/engine.py"}
TRANSFORMERS = {
    "pipeline/attention.py",
    "pipeline/cross_attention.py",
    "pipeline/export.py",
    "pipeline/export_merged.py",
    "pipeline/export_peft.py",
    "pipeline/models.py",
    "pipeline/tiny.py",
    "pipeline/workload.py",
    "data_prep/batches.py",
    "eval/decode.py",
    "eval/prompt_state.py",
    "eval/quick_encoder.py",
}


def imports(path: Path) -> set[str]:
    """Dotted names of all imported modules, those for type checking alone left out."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def third_party(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def uses(path: Path, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imports(path) for module in modules)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_follow_the_rules(path: Path) -> None:
    here = place(path)
    if here.startswith("pipeline/methods/"):
        assert not uses(path, "deepspeed", "torch.distributed", "transformers", "data_prep", "eval")
    if here.startswith("pipeline/adapters/"):
        assert all(name.startswith(("torch", "pipeline.adapters")) for name in third_party(path))
    if here.startswith("pipeline/projection/"):
        assert all(name.startswith(("torch", "pipeline.projection")) for name in third_party(path))
    if here not in ENGINE:
        assert not uses(path, "deepspeed", "torch.distributed")
    if here not in TRANSFORMERS:
        assert not uses(path, "transformers")
    if here.startswith("data_prep/") and here != "data_prep/__main__.py":
        assert not uses(path, "pipeline", "eval")
    if here.startswith("eval/") and here != "eval/__main__.py":
        assert not uses(path, "pipeline")
    assert not uses(path, "pipeline.train")


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_file_hides_an_installed_or_standard_module(path: Path) -> None:
    if path.name in ("__init__.py", "__main__.py"):
        return
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert path.stem not in taken - set(PACKAGES)


def test_projection_and_entry_import_nothing_at_the_top_that_works() -> None:
    """`__init__.py` files are empty or re-export."""
    for path in FILES:
        if path.name == "__init__.py":
            allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
            assert all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body), path


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from torch import distributed\n    import deepspeed.comm\n")
    assert uses(path, "torch.distributed")
    assert uses(path, "deepspeed")
