"""The import direction, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # what each package may import of the others
    "scoresde": {"scoresde"},
    "samplers": {"scoresde", "samplers"},
    "guidance": {"scoresde", "guidance"},
    "experiments": {"scoresde", "samplers", "guidance", "experiments"},
}
ON_USE = {"open_clip", "sklearn", "matplotlib", "diffusers", "transformers", "accelerate", "PIL", "jinja2"}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(body):
    """Top names of all imports among these nodes; a relative import is of the package itself."""
    names = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def on_import(node):
    """All nodes that run when the file is imported: functions' bodies do not."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from on_import(child)


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"scoresde", "samplers"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    assert not imported(ast.walk(tree)) & (set(ALLOWED) - ALLOWED[package]), path
    assert "tests" not in imported(ast.walk(tree))
    if package != "experiments":
        assert not imported(on_import(tree)) & ON_USE, path


def test_the_checks_see_what_they_should():
    tree = ast.parse(
        "import a.b\nfrom c.d import e\nfrom . import f\nif True:\n    import g\n"
        "class C:\n    import h\ndef u():\n    import open_clip\n"
    )
    assert imported(ast.walk(tree)) == {"a", "c", "g", "h", "open_clip"}
    assert imported(on_import(tree)) == {"a", "c", "g", "h"}
