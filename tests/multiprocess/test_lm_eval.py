"""lm-evaluation-harness on two processes, each with a share of the rows: the scores of one process."""

import json

import pytest
import yaml

from tests.support.lm_eval_tasks import NAMES, write_tasks

pytest.importorskip("lm_eval", reason="pip install -r requirements-lm-eval.txt")
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_two_processes_share_the_rows(finished, forked, models_without_dropout, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    options = {"tasks": NAMES, "include_path": str(write_tasks(tasks))}
    evals = [{"class_path": "LmEval", "init_args": options}]

    def job(name, *more):
        config = {
            "model": {"name": str(models_without_dropout / "llama"), "adapter": None},
            "data": {"class_path": "BenchmarkDataModule", "init_args": {"evals": evals}},
            "trainer": {"accelerator": "cpu"},
            "output": {"name": name, "root": str(tmp_path / "runs"), "wandb": "disabled"},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        argv = ["test", f"--config={tmp_path / name}.yaml", *more]
        return {"argv": argv, "keep": str(tmp_path / "kept")}

    finished([job("alone")], processes=1)
    two = ("--trainer.devices=2", "--config=strategies/ddp.yaml")
    finished([job("ddp", *two)])
    found = {}
    for name in ("alone", "ddp"):
        folder = tmp_path / "runs" / name
        (result,) = json.loads((folder / "benchmarks.json").read_text()).values()
        (file,) = (folder / "answers" / "test").glob("lm_eval-*.jsonl")
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        rows = answers[0]["samples"]["own_choosing"]
        found[name] = result["scores"], {row["doc_id"]: row["filtered_resps"] for row in rows}
        assert [row["key"] for row in answers] == NAMES
        assert result["questions"] == 2
        assert len(rows) == 11
    for scores, _ in found.values():  # drawn from the rows in the order of the processes
        assert scores.pop("own_writing/bleu_stderr,whole") > 0
    assert found["ddp"][0] == pytest.approx(found["alone"][0], rel=1e-12)
    assert len(found["ddp"][0]) == 11
    assert found["ddp"][1].keys() == found["alone"][1].keys()
    config = job("fsdp")["argv"][1]
    ends = forked(
        [
            {
                "argv": ["test", config, "--config=strategies/fsdp.yaml", two[0]],
                "keep": str(tmp_path / "kept"),
            }
        ]
    )
    assert all(status == 1 or status == 2 for status, _ in ends)
    assert "but this strategy shards its weights" in ends[0][1]
