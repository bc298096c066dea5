"""compare.json: what a comparison was asked for, kept beside its cells."""

import json

import pytest

from app.commands.compare.cells import Cell
from app.commands.compare.manifest import GridManifest, read_manifest, update_manifest
from app.utils.errors import InputError

CELL = Cell("lora", 1e-3, 0)


def manifest(steps, *cells, **more):
    return GridManifest(task={"trainer.max_steps": steps}, cells=cells, **more)


def test_a_manifest_of_which_nothing_was_trained_gives_way(tmp_path):
    update_manifest(tmp_path, manifest(1, CELL, Cell("dora", 1e-3, 0)))
    update_manifest(tmp_path, manifest(2, CELL))
    assert read_manifest(tmp_path) == manifest(2, CELL)
    (tmp_path / "cells" / CELL.name / "version_0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"another task: trainer.max_steps \(2, 3\)"):
        update_manifest(tmp_path, manifest(3, CELL))


def test_a_file_that_is_no_manifest_is_not_overwritten(tmp_path):
    file = tmp_path / "compare.json"
    file.write_text('{"cells": [["lora", 0.001, 0], ["lora", 0.003]]}')
    with pytest.raises(InputError, match=r"compare.json is no list .*cells\.1"):
        update_manifest(tmp_path, manifest(1, CELL))
    assert "0.003" in file.read_text()


def test_settings_that_a_class_no_longer_has_are_left_out(tmp_path):
    task = {"data.class_path": "CommonsenseDataModule", "data.init_args.hub_id": "x"}
    now = GridManifest(task={"data.class_path": "CommonsenseDataModule"}, cells=[CELL])
    update_manifest(tmp_path, GridManifest(task=task, cells=[CELL]))
    (tmp_path / "cells" / CELL.name / "version_0").mkdir(parents=True)
    update_manifest(tmp_path, now)
    assert read_manifest(tmp_path) == now


def test_the_same_folder_with_a_model_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "cells" / CELL.name / "version_0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    written = GridManifest(cells=[CELL]).model_dump() | {"task": {"model.name": "model"}}
    (tmp_path / "compare.json").write_text(json.dumps(written))
    update_manifest(
        tmp_path, GridManifest(task={"model.name": str(tmp_path / "model")}, cells=[CELL])
    )
    with pytest.raises(InputError, match=r"another task: model\.name"):
        update_manifest(tmp_path, GridManifest(task={"model.name": "other"}, cells=[CELL]))


def test_a_manifest_without_ranks_is_read(tmp_path):
    (tmp_path / "compare.json").write_text('{"cells": [["lora", 0.001, 0], ["lora", 0.001, 0, 8]]}')
    cells = [CELL, Cell("lora", 1e-3, 0, 8)]
    assert read_manifest(tmp_path).cells == cells
    update_manifest(tmp_path, manifest(1, *cells))
    assert read_manifest(tmp_path).cells == cells


def test_a_wider_grid_adds_to_it(tmp_path):
    settings = {"model.optimizer.class_path": "app.precond_adamw.PreconditionedAdamW"}
    named = {"model.optimizer.class_path": "PreconditionedAdamW"}  # as this version does
    update_manifest(tmp_path, manifest(1, CELL, methods={"lora_one": settings}))
    other = Cell("lora", 1e-2, 7)
    update_manifest(tmp_path, manifest(1, other, CELL, methods={"lora": {}}))
    methods = {"lora_one": named, "lora": {}}
    assert read_manifest(tmp_path) == manifest(1, CELL, other, methods=methods)
