"""`compare` on a table and on conversations of one's own."""

import shutil

import pytest
import yaml

from tests.support.matrix import CHAT_TEMPLATE
from tests.support.matrix_data import chat, table
from tests.support.run_folders import summary

GRID = ("--methods=lora,lora_one", "--learning_rates=1e-3", "--seeds=0")
SHORT = ("--trainer.max_steps=1", "--init.num_samples=4")


@pytest.fixture
def options(run_models, tmp_path):
    """Return `options(section)`: those of a comparison that reads a section `data`."""

    def write(section):
        model = shutil.copytree(run_models / "llama", tmp_path / "model")
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        file = tmp_path / "data.yaml"
        file.write_text(yaml.safe_dump({"data": section}))
        return "--config", file, f"--model.name={model}", *SHORT

    return write


def cells(tmp_path):
    return [summary(folder) for folder in sorted((tmp_path / "runs").rglob("version_*"))]


@pytest.mark.slow
def test_a_table(compare, options, tmp_path):
    """Rows are set aside to choose rates by, as of a published set: a fifth of those that train."""
    assert compare(*GRID, options=options(table(tmp_path) | {"class_path": "TableDataModule"})) == 0
    rows = [cell["data"]["rows"] for cell in cells(tmp_path)]
    assert rows == [{"train": 8, "validation": 4, "test": 4}] * 2


@pytest.mark.slow
def test_conversations(compare, options, tmp_path):
    assert compare(*GRID, "--score=loss", options=options(chat(tmp_path))) == 0
    assert [set(cell["metrics"]["test"]) for cell in cells(tmp_path)] == [{"loss"}] * 2


def test_a_table_without_test_rows_is_refused(refused, options, tmp_path):
    """The rate would be chosen on the rows that are reported."""
    section = table(tmp_path)
    del section["init_args"]["test_size"]
    told = refused(*GRID, options=options(section))
    assert "the validation rows of table are the rows that the test reports" in told
    assert "set training rows aside for the test with --data.test_size" in told
