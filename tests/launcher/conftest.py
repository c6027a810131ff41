"""What several tests of batch scripts start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.slurm_stand_ins import Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster of stand-ins."""
    monkeypatch.setenv("STATE", "")
    return Cluster(tmp_path)
