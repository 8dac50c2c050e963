"""Every feature of the table is shown by a test that exists, or the table says what there is instead."""

import ast
from pathlib import Path

import pytest

from tests.tf.features import CELLS


@pytest.mark.parametrize("feature", CELLS)
def test_every_feature_is_shown_by_a_test_or_refused(feature: str) -> None:
    if CELLS[feature].startswith("("):
        return
    file, name = CELLS[feature].split("::")
    nodes = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
