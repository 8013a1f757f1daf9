"""Public names: what a room's `__init__` binds is in its `__all__`, exists and is documented.

A room without `__all__` exports nothing: its `__init__` then binds no public name at all.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "anabranch"
INITS = sorted(PACKAGE.rglob("__init__.py"))


def module_name(init: Path) -> str:
    return ".".join(init.parent.relative_to(PACKAGE.parent).parts)


def bound_names(tree: ast.Module) -> set[str]:
    """Public names that the module's own statements bind; `from x import y as _y` binds a private one."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def exported_names(tree: ast.Module) -> list[str]:
    """The literal `__all__`; none where the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return []


def test_the_reader_of_init_files_sees_every_kind_of_name() -> None:
    tree = ast.parse("""
import os.path
from a import B, c as _c
X = 1
y: int = 2
def f(): ...
class G: ...
__all__ = ["B", "X"]
""")
    assert bound_names(tree) == {"os", "B", "X", "y", "f", "G"}
    assert exported_names(tree) == ["B", "X"]


@pytest.mark.parametrize("init", INITS, ids=module_name)
def test_public_names_are_exported(init: Path) -> None:
    tree = ast.parse(init.read_text(encoding="utf-8"))
    exported = exported_names(tree)
    missing = bound_names(tree) - set(exported)
    assert not missing, f"public in {module_name(init)} but not in its __all__: {sorted(missing)}"
    assert len(exported) == len(set(exported)), f"twice in __all__ of {module_name(init)}"


@pytest.mark.parametrize("init", INITS, ids=module_name)
def test_exported_names_exist_and_are_documented(init: Path) -> None:
    module = importlib.import_module(module_name(init))
    for name in exported_names(ast.parse(init.read_text(encoding="utf-8"))):
        member = getattr(module, name)
        if inspect.isclass(member) or inspect.isroutine(member):
            assert (member.__doc__ or "").strip(), f"{module.__name__}.{name} is public and has no docstring"
