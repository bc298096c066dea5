"""Which part may import which, read from the sources."""

import ast
import sys

import pytest
from conftest import ROOT

PURE = (
    "app.spectral_init",
    "app.gradient",
    "app.observer",
    "app.precond_adamw",
    "app.precondition",
)


def imports(path):
    """Return the full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def packages(path):
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("module", PURE)
def test_pure_mathematics_imports_torch_alone(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    outside = packages(path) - sys.stdlib_module_names - {"torch", "app"}
    assert not outside
    ours = {name for name in imports(path) if name.startswith("app.")}
    assert all(name.startswith(PURE) for name in ours), ours


def test_peft_is_known_to_one_file():
    everywhere = [*files("app"), *files("callbacks"), *files("data_modules"), ROOT / "train.py"]
    assert len(everywhere) > 20
    assert [path.name for path in everywhere if "peft" in packages(path)] == ["adapters.py"]


def test_callbacks_know_neither_each_other_nor_the_data():
    paths = [path for path in files("callbacks") if path.name != "__init__.py"]
    assert len(paths) >= 4
    for path in paths:
        assert not packages(path) & {"callbacks", "data_modules"}, path


def test_data_modules_know_no_callbacks():
    for path in files("data_modules"):
        assert "callbacks" not in packages(path), path
        assert "app.module" not in imports(path), path


def test_mechanisms_do_not_know_the_parts_that_use_them():
    users = {"app.cli", "app.parser"}  # the command line, where all parts meet
    for path in files("app"):
        if f"app.{path.stem}" not in users:
            assert not packages(path) & {"callbacks", "data_modules"}, path


def test_train_py_is_a_few_lines():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 12
