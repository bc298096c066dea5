"""What the import contract in .importlinter does not say about the tree."""

import ast
from graphlib import TopologicalSorter

import grimp

from tests.support.paths import ROOT

CALLBACK_BASE = "callbacks.initialization"


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
    return names


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_app_has_rooms_only():
    assert [path.name for path in (ROOT / "app").glob("*.py")] == ["__init__.py"]


def test_peft_is_imported_in_app_models_alone():
    users = {
        path.relative_to(ROOT).parent.as_posix()
        for path in [*files("app", "callbacks", "data_modules"), ROOT / "train.py"]
        if any(name.partition(".")[0] == "peft" for name in imports(path))
    }
    assert users == {"app/models"}


def test_callbacks_import_no_callback_but_their_base():
    paths = files("callbacks")
    assert len(paths) > 8
    for path in paths:
        others = {name for name in imports(path) if name.startswith("callbacks.")}
        assert others <= {CALLBACK_BASE}, path


def test_train_py_is_a_few_lines():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 12


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("app", "callbacks", "data_modules")
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 100
    TopologicalSorter(imported).prepare()


def test_files_and_functions_are_of_one_idea():
    """At most 300 and 60 lines."""
    for path in files("app", "callbacks", "data_modules"):
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
