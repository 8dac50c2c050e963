"""Folders with random damage: they convert to an output that is whole and loads, or are refused on one line."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mistral_hf.convert.verify import verify
from tests.helpers.damage import Damage, damages
from tests.helpers.hostile_folders import KINDS, convert, refusal, write_folders

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


def check_comparison(source: Path, spoils: list[Damage]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        damaged = shutil.copytree(source, Path(folder) / "in")
        for spoil in spoils:
            spoil(damaged)
        event("refused" if refusal(lambda: list(verify(source, damaged))) else "compared")


COMPARED = [kind for kind in KINDS if kind not in ("lora", "peft")]


@pytest.mark.parametrize("kind", ["pth-2", "hf-sharded"])
@given(spoils=st.lists(damages(), min_size=1, max_size=2))
@few
def test_damaged_folders_are_compared_or_refused_on_one_line(
    kind: str, folders: dict[str, Path], spoils: list[Damage]
) -> None:
    check_comparison(folders[kind], spoils)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPARED)
@given(spoils=st.lists(damages(), min_size=1, max_size=2))
@many
def test_many_damaged_folders_are_compared_or_refused_on_one_line(
    kind: str, folders: dict[str, Path], spoils: list[Damage]
) -> None:
    check_comparison(folders[kind], spoils)
