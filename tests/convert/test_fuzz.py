"""Conversions of folders with random damage: an output that is whole and loads, or one line and no output."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.helpers.damage import Damage, damages
from tests.helpers.hostile_folders import KINDS, convert, write_folders

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=1500)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("folders"))


def check(source: Path, spoils: list[Damage]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        damaged = shutil.copytree(source, Path(folder) / "in")
        for spoil in spoils:
            spoil(damaged)
        event("refused" if convert(damaged, Path(folder) / "out") else "converted")


@pytest.mark.parametrize("kind", KINDS)
@given(spoils=st.lists(damages(), min_size=1, max_size=2))
@few
def test_damaged_folders_are_refused_on_one_line_or_converted_whole(
    kind: str, folders: dict[str, Path], spoils: list[Damage]
) -> None:
    check(folders[kind], spoils)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(spoils=st.lists(damages(), min_size=1, max_size=2))
@many
def test_many_damaged_folders_are_refused_on_one_line_or_converted_whole(
    kind: str, folders: dict[str, Path], spoils: list[Damage]
) -> None:
    check(folders[kind], spoils)
