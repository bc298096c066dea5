"""Tables and conversations of one's own: one process, DDP and FSDP2 train alike."""

import json
import shutil

import pytest
import yaml

from tests.support.matrix import CHAT_TEMPLATE
from tests.support.parity import assert_strategies_alike

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def conversations(folder):
    """Write 61 of them, of one answer to four, of one word to seven."""
    rows = []
    for i in range(61):
        turns = [("user", f"Say {i}."), ("assistant", "so " * (i % 7 + 1) + ".")] * (i % 4 + 1)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "ChatDataModule", folder / "rows.jsonl"


def table(folder):
    """Write 61 labelled texts of one word to nine."""
    lines = [f"{'a film ' * (i % 9)}{i},{('negative', 'positive')[i % 2]}\n" for i in range(61)]
    (folder / "rows.csv").write_text("text,label\n" + "".join(lines))
    return "TableDataModule", folder / "rows.csv"


@pytest.mark.parametrize("write", [conversations, table])
def test_processes_train_alike(write, parity_config, models_without_dropout, finished, tmp_path):
    model = shutil.copytree(models_without_dropout / "llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    name, path = write(tmp_path)
    config = yaml.safe_load(parity_config.read_text())
    config["data"] = {"class_path": name, "init_args": {"path": str(path), "eval_batch_size": 7}}
    file = tmp_path / "rows.yaml"
    file.write_text(yaml.safe_dump(config))
    assert_strategies_alike(file, model, tmp_path, finished)
