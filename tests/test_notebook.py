"""The notebook runs from its first cell to its last, and what is stored of it is what a reader may see."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

PATH = ROOT / "docs" / "notebook.ipynb"
IN_PROCESS = """
import app.cli.main

first = run


def run(command):
    if command.startswith("plan"):
        first(command)
    else:
        assert app.cli.main.main(shlex.split(command)) == 0
        get_ipython().run_line_magic("matplotlib", "inline")  # the command draws into files
"""


def test_stored_outputs_name_no_folder_of_a_machine_and_no_error():
    for cell in nbformat.read(PATH, 4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not re.search(r"(?<![\w.:/])/\w+/", str(output.get("text", "")))
            assert "image/png" not in output.get("data", {}) or cell.metadata["alt"]


@pytest.mark.slow(seconds=45)
def test_every_cell_runs(run_models, tmp_path, monkeypatch):
    """In a copy of the project's folder, with two steps of a tiny model on few sentences.

    The first command has its own process, as they all have elsewhere; the others share the notebook's.
    """
    for path in ROOT.iterdir():
        if path.name not in ("runs", "docs"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    options = "--trainer.max_steps 2 --data.validation_size 8 --init.num_samples 8"
    options += f" --model.name {run_models / 'llama'}"
    monkeypatch.setenv("NOTEBOOK_OPTIONS", options)
    notebook = nbformat.read(PATH, 4)
    [definition] = [cell for cell in notebook.cells if cell.source.startswith("def run(")]
    definition.source += IN_PROCESS
    client = NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": tmp_path / "docs"}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 10
    assert (tmp_path / "runs/notebook/lora_one/version_0/bfloat16/model.safetensors").is_file()
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "-> " in texts[8]  # the adapter's answer
    pictures = [
        output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
