"""The notebook runs from its first cell to its last, and what is stored of it is what a reader may see."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

PATH = ROOT / "docs" / "notebook.ipynb"


def test_stored_outputs_name_no_folder_of_a_machine_and_no_error():
    for cell in nbformat.read(PATH, 4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not re.search(r"(?<![\w.:/])/\w+/", str(output.get("text", "")))
            assert "image/png" not in output.get("data", {}) or cell.metadata["alt"]


@pytest.mark.smollm2
def test_every_cell_runs(tmp_path, monkeypatch):
    """In a copy of the project's folder, with two steps on few sentences."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "docs"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    options = "--trainer.max_steps 2 --data.validation_size 8 --init.num_samples 8"
    monkeypatch.setenv("NOTEBOOK_OPTIONS", options)
    notebook = nbformat.read(PATH, 4)
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
