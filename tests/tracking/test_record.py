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
    "init": {"seconds": 2, "gamma": 16.0, "peak_bytes": [5], "niter": None},
    "train": {"steps": 4, "seconds": 1.5, "samples_per_second": 0.0, "device": ""},
}


def test_a_record_is_what_was_written(tmp_path):
    record = RunRecord.from_json(WRITTEN)
    assert record.model == ModelRecord("m", "f", 10, 2)
    assert record.data == DataRecord(
        "glue/sst2", {"train": 3}, details={"source": "hub", "evals": []}
    )
    assert record.init == InitRecord(2, [5], details={"gamma": 16.0, "niter": None})
    assert record.train == TrainRecord(4, 1.5, samples_per_second=0.0, device="")
    assert record.to_json() == WRITTEN
    record.write(tmp_path / "summary.json")
    assert RunRecord.read(tmp_path / "summary.json") == record


def test_sections_and_values_that_an_earlier_version_did_not_write():
    record = RunRecord.from_json({"metrics": {}, "notes": "of another version"})
    assert record == RunRecord()
    assert record.to_json() == {
        **{"method": "", "model": {}, "data": {}, "seed": None, "metrics": {}, "init": {}},
        "train": {"steps": 0},
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
        ("init", {"peak_bytes": [5, "x"]}, "init.peak_bytes 1 is 'x'"),
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
