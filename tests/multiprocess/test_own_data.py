"""Tables and conversations of one's own: one process and two train alike."""

import json
import shutil

import pytest
import yaml

from tests.support.matrix import CHAT_TEMPLATE
from tests.support.parity import assert_alike, parity_job, two_processes

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


def test_processes_train_alike(parity_config, models_without_dropout, finished, tmp_path):
    """With DDP: rows are shared out alike with FSDP2, of which tests/multiprocess/test_parity.py has more."""
    model = shutil.copytree(models_without_dropout / "llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = yaml.safe_load(parity_config.read_text())
    files = []
    for name, path in (conversations(tmp_path), table(tmp_path)):
        config["data"] = {
            "class_path": name,
            "init_args": {"path": str(path), "eval_batch_size": 7},
        }
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(config))

    def jobs(where, batch_size, *more):
        return [parity_job(f, model, tmp_path / where / f.stem, batch_size, *more) for f in files]

    finished(jobs("alone", 8), processes=1)
    finished(jobs("ddp", 4, *two_processes("ddp")))
    for file in files:
        assert_alike(tmp_path / "ddp" / file.stem, tmp_path / "alone" / file.stem, 2)
