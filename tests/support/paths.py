"""Folders that tests read."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
"""Published data sets, as their authors distribute them; see `needs_data`."""


def needs_data(*names: str) -> pytest.MarkDecorator:
    """Mark tests that read published files below `DATA`, and are skipped where these are absent."""
    missing = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"{', '.join(missing)} is not in {DATA}: put the published files there (docs/data.md)",
    )
