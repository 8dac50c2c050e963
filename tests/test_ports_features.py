"""Every cell of the table of the ports' features is a test that exists, or says what there is instead."""

import ast
from pathlib import Path

import pytest

from tests.ports_features import FEATURES, PORTS, markdown

TESTS = Path(__file__).parent


@pytest.mark.parametrize("port", PORTS)
def test_every_feature_is_shown_by_a_test_or_refused(port: str) -> None:
    for feature, cells in FEATURES.items():
        assert set(cells) == set(PORTS), feature
        if cells[port].startswith("("):
            continue
        file, name = cells[port].split("::")
        nodes = ast.parse((TESTS / port / file).read_text(encoding="utf-8")).body
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{feature}: {cells[port]}"


def test_the_table_has_a_row_for_every_feature() -> None:
    assert len(markdown().splitlines()) == len(FEATURES) + 2
