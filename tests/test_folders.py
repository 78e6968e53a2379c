"""The cache folder: the named one, or that of the platform."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ase_enf.data import qm9
from ase_enf.folders import cache_folder


def test_the_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASE_ENF_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == qm9.cache_folder() == tmp_path / "mine" and not (tmp_path / "mine").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASE_ENF_CACHE", "here")
    assert cache_folder() == tmp_path / "here"


@pytest.mark.skipif(sys.platform != "linux", reason="the rule of Linux")
def test_the_platforms_folder_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASE_ENF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ase-enf"
