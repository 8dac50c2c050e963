"""The benchmarks of the ports run in tiny sizes; the times that they measure there mean nothing."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.report import RESULTS

PORTS = {"flax": "flax", "tf": "tensorflow"}  # by benchmark, the extra's package that it imports first


@pytest.fixture(scope="module", params=sorted(PORTS))
def port(request: pytest.FixtureRequest) -> ModuleType:
    pytest.importorskip(PORTS[request.param])
    return import_module(f"benchmarks.{request.param}")


def test_every_part_is_recorded_in_the_layout_of_the_results(
    port: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that a run does not measure are kept; to save time, programs are compiled in this process."""
    monkeypatch.setattr(port, "in_fresh_process", lambda function, *inputs: function(*inputs), raising=False)
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"other": {"seconds": 1}}))
    port.main(["--tiny", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found.pop("other") == {"seconds": 1}
    recorded = json.loads((RESULTS / f"{port.__name__.removeprefix('benchmarks.')}.json").read_text())
    assert found.keys() == recorded.keys() == port.PARTS.keys()
    for part, result in recorded.items():
        assert result.keys() <= found[part].keys()
        for field in ("seconds", "times_faster_than"):
            assert result.get(field, {}).keys() == found[part].get(field, {}).keys()
        assert result["environment"].keys() == found[part]["environment"].keys()
