"""The benchmarks run end to end in tiny sizes; the times that they measure there mean nothing."""

import json
import platform
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_block, harness, linear, plot, run
from benchmarks.cases import CASES
from benchmarks.report import RESULTS, select

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a tiny run of all cases without further processes writes."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    run.main(["--tiny", "--no-memory", "--output", str(path), "--cases", *names_of_cases()])
    return path


def names_of_cases() -> list[str]:
    """All except the one that starts interpreters and, without a C++ compiler, the one that compiles."""
    left_out = {"import"} if shutil.which("g++") else {"import", "decode_short_compiled"}
    return [case.name for case in CASES if case.name not in left_out]


def case_named(name: str) -> Any:
    return select([name], CASES)[0]


def test_every_case_is_recorded(results: Path) -> None:
    cases = json.loads(results.read_text())["cases"]
    assert [case["name"] for case in cases] == names_of_cases()
    for case in cases:
        assert case["versions"].keys() == {"mistral_hf", "reference"}
        for version in case["versions"].values():
            seconds = version["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert len(seconds["samples"]) == 2
            assert version["share_of_limit"] * seconds["median"] == pytest.approx(case["limit"]["seconds"])
        assert case["speedup"]["min"] <= case["speedup"]["max"]
        assert 0 <= case["largest_relative_difference"] <= 0.08


def test_the_machine_is_recorded_and_nothing_personal(results: Path) -> None:
    record = json.loads(results.read_text())
    assert record["environment"]["torch"] == torch.__version__
    assert {"date", "cpu", "cores", "threads", "transformers", "mistral_hf"} <= record["environment"].keys()
    assert record["limits"]["matrix_rate"].keys() == {"float32", "bfloat16"}
    assert record["prefill_growth_8k_to_32k"].keys() == {"mistral_hf", "reference"}
    for private in (platform.node(), str(Path.home()), str(ROOT)):
        assert len(private) < 5 or private not in results.read_text()


def test_plot_writes_a_png(results: Path, tmp_path: Path) -> None:
    record = json.loads(results.read_text())
    for case in record["cases"]:
        case["memory_ratio"] = 1.0
        for version in case["versions"].values():
            version["peak_memory_bytes"] = 2**20
    measured, picture = tmp_path / "measured.json", tmp_path / "plot.png"
    measured.write_text(json.dumps(record))
    plot.main([str(measured), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_results_without_peak_memory(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.main([str(results)])
    assert "0 lengths with their peak memory are too few to plot" in capsys.readouterr().err


def test_peak_memory_counts_the_cache() -> None:
    case = replace(case_named("prefill_1k").tiny(), length=4096, window=None, batch=16)
    shape = case.shape
    cache = 2 * case.batch * case.length * shape.kv_heads * shape.head_dim * shape.layers * 4
    assert cache <= harness.in_fresh_process(harness.peak_memory, case, "mistral_hf", "sdpa") < 20 * cache


def test_plot_draws_the_recorded_results(tmp_path: Path) -> None:
    plot.main([str(RESULTS / "lengths.json"), "--output", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_samples_alternate() -> None:
    order: list[str] = []
    runs: dict[str, harness.Run] = {version: partial(order.append, version) for version in harness.VERSIONS}
    seconds, difference = harness.interleave("case", runs, 2, 0.0)
    assert order == ["mistral_hf", "reference"] * 2
    assert [len(samples) for samples in seconds.values()] == [2, 2]
    assert difference is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [([1, 2], [1, 3]), ([1.0, 2.0], [1.0, 2.1]), ([1.0, float("nan")], [1.0, 2.0])],
)
def test_a_disagreement_stops_the_case(found: list[float], expected: list[float]) -> None:
    runs: dict[str, harness.Run] = {
        "mistral_hf": lambda: torch.tensor(found),
        "reference": lambda: torch.tensor(expected),
    }
    with pytest.raises(harness.AgreementError, match="case: mistral_hf and reference"):
        harness.interleave("case", runs, 1, 1e-3)


def test_every_version_is_compared_with_the_reference() -> None:
    runs: dict[str, harness.Run] = {
        "port": lambda: torch.tensor([1.0, 2.5]),
        "mistral_hf": lambda: torch.tensor([1.0, 2.0]),
        "reference": lambda: torch.tensor([1.0, 2.0]),
    }
    with pytest.raises(harness.AgreementError, match="case: port and reference"):
        harness.interleave("case", runs, 1, 1e-3)


def test_a_disagreement_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(harness.TOLERANCES, "float32", -1.0)
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="Not counted:\nprefill_short: mistral_hf and reference differ"):
        run.main(["--tiny", "--cases", "prefill_short", "decode_short", "--output", str(output)])
    assert [case["name"] for case in json.loads(output.read_text())["cases"]] == ["decode_short"]


def test_a_ratio_is_that_of_the_medians_with_the_extremes_of_the_pairs() -> None:
    assert harness.ratio([1.0, 2.0, 4.0], [3.0, 8.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_limit_is_set_by_the_scarcer_resource() -> None:
    limits = harness.Limits(10.0, 20.0, {"float32": 100.0})
    cost = harness.Cost(1, "tokens", bytes_moved=60.0, operations=200.0)
    assert limits.least_seconds(cost) == (3.0, "bytes moved")
    assert limits.least_seconds(replace(cost, operations=400.0)) == (4.0, "operations")


def test_costs_are_those_of_the_model() -> None:
    case = case_named("decode_past_window_b8")
    keys_and_values = 2 * 8 * 4096 * 3 * 64 * 30 * 4
    assert case.cost().bytes_moved == 6 * (4 * case.shape.parameters + keys_and_values)
    model = case.tiny().load("mistral_hf", "sdpa")
    assert case.tiny().shape.parameters == sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    prefill = replace(case_named("prefill_1k").tiny(), length=5, window=3)
    assert prefill._visible_pairs() == 1 + 2 + 3 + 3 + 3


def test_import_reports_what_it_adds() -> None:
    details = case_named("import").tiny().details()
    assert details["added_seconds"] > 0
    assert "mistral_hf" in details["added_packages"]


def test_layers_set_the_layers_of_every_model() -> None:
    _, cases = run.parse(["--layers", "3", "--cases", "lengths", "import"])
    assert {case.shape.layers for case in cases if case.group == "lengths"} == {3}  # type: ignore[attr-defined]


def test_repeats_set_the_samples_of_every_case() -> None:
    _, cases = run.parse(["--repeats", "4", "--tiny"])
    assert {case.repeats for case in cases} == {4}


def test_list_prints_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--list"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "decode_shrot"], "No case or group is called decode_shrot"),
        (["--repeats", "0"], "argument --repeats: 0 is too small: give at least 1"),
        (["--layers", "-1"], "argument --layers: -1 is too small: give at least 1"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_attention_block_measures_every_block(tmp_path: Path) -> None:
    output = tmp_path / "block.json"
    attention_block.main(["--tiny", "--repeats", "1", "--output", str(output)])
    seconds = json.loads(output.read_text())["seconds"]
    assert len(seconds) == 4
    assert all(list(medians) == ["128", "256", "512", "1024", "2048"] for medians in seconds.values())


def test_linear_records_every_number_of_rows(tmp_path: Path) -> None:
    linear.main(["--tiny", "--repeats", "1", "--output", str(tmp_path / "products.json")])
    products = json.loads((tmp_path / "products.json").read_text())["products"]
    assert [product["rows"] for product in products] == list(linear.ROWS)
    assert all(product["ratio"] > 0 and product["mistral_hf"]["GB/s"] > 0 for product in products)
