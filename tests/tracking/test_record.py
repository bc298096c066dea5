"""summary.json: what a run has written is read back the same, that of an earlier version too."""

import json

import pytest

from app.tracking.record import DataRecord, InitRecord, ModelRecord, RunRecord, TrainRecord
from app.utils.errors import InputError

WRITTEN = {
    "method": "lora_one",
    "model": {
        "name": "m",
        "fingerprint": "f",
        "parameters": 10,
        "trainable_parameters": 2,
    },
    "data": {"name": "glue/sst2", "rows": {"train": 3}, "source": "hub", "evals": []},
    "seed": None,
    "metrics": {"final": {"accuracy": 1, "loss": float("inf")}, "test": {"gsm8k/strict": 0.5}},
    "lower_is_better": ["lm_eval/wikitext/word_perplexity,none"],
    "init": {"seconds": 2, "gamma": 16.0, "peak_bytes": [5], "niter": None},
    "train": {"steps": 4, "seconds": 1.5, "samples_per_second": 0.0, "device": ""},
}


def test_a_record_is_what_was_written(tmp_path):
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(WRITTEN))
    record = RunRecord.read(file)
    assert record.model == ModelRecord(
        name="m", fingerprint="f", parameters=10, trainable_parameters=2
    )
    assert record.data == DataRecord(name="glue/sst2", rows={"train": 3}, source="hub", evals=[])
    assert record.init == InitRecord(seconds=2, peak_bytes=[5], gamma=16.0, niter=None)
    assert record.train == TrainRecord(steps=4, seconds=1.5, samples_per_second=0.0, device="")
    record.write(file)
    assert json.loads(file.read_text()) == WRITTEN


def test_a_record_of_another_version(tmp_path):
    """What it lacks has a default, and what it has more is kept."""
    file = tmp_path / "summary.json"
    file.write_text('{"metrics": {}, "notes": "of another version"}')
    record = RunRecord.read(file)
    assert (record.method, record.seed, record.model) == ("", None, ModelRecord())
    record.metrics["test"] = {"accuracy": 0.5}
    record.write(file)
    assert json.loads(file.read_text()) == {
        **{"method": "", "model": {}, "data": {}, "seed": None, "init": {}, "train": {}},
        **{
            "metrics": {"test": {"accuracy": 0.5}},
            "lower_is_better": [],
            "notes": "of another version",
        },
    }


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("metrics", None, "metrics is None"),
        ("metrics", {"final": None}, "metrics.final is None"),
        ("metrics", {"final": {"accuracy": "high"}}, "metrics.final.accuracy is 'high'"),
        ("metrics", {"final": {"accuracy": None}}, "metrics.final.accuracy is None"),
        *((name, None, f"{name} is None") for name in ("data", "train", "init", "model")),
        ("train", {"steps": "many"}, "train.steps is 'many'"),
        ("init", {"peak_bytes": 5}, "init.peak_bytes is 5"),
        ("init", {"peak_bytes": [5, "x"]}, "init.peak_bytes.1 is 'x'"),
        ("seed", "x", "seed is 'x'"),
        ("data", {"rows": 3}, "data.rows is 3"),
    ],
)
def test_damage_is_named(part, value, message, tmp_path):
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({**WRITTEN, part: value}))
    with pytest.raises(InputError) as raised:
        RunRecord.read(file)
    assert str(raised.value) == f"summary.json is damaged: {message}"


def test_what_is_no_record(tmp_path):
    file = tmp_path / "summary.json"
    with pytest.raises(InputError, match=r"summary.json cannot be read: No such file"):
        RunRecord.read(file)
    for content in ("{", "[]", "{}", "3"):
        file.write_text(content)
        with pytest.raises(InputError, match=r"^summary.json is damaged: "):
            RunRecord.read(file)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    record = RunRecord(method="m", metrics={"final": {"accuracy": 0.5, "loss": 1.0}})
    record.write(tmp_path / "summary.json")
    record.init = InitRecord(broken=object())
    with pytest.raises(TypeError):
        record.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == record.metrics
    assert record.score_table().splitlines() == [
        "                accuracy        loss",
        "       final      0.5000      1.0000",
    ]
