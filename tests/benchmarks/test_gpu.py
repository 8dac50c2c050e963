"""The GPU benchmark runs end to end on the CPU in tiny sizes; the times that it measures there mean nothing."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_hf.torch import flash_kernels
from tests.helpers import fake_flash_kernels as standin

ROOT = Path(__file__).parents[2]
SOME = ("decode_b8_8k", "decode_b8_32k_compiled", "prefill_4k_sdpa", "prefill_16k_flash", "prefill_64k_sdpa_chunked")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        names = ("gpu", "gpu_cases", "harness", "plot")
        yield SimpleNamespace(**{name: import_module(f"benchmarks.{name}") for name in names})


def tiny_run(benchmarks: SimpleNamespace, output: Path, *more: str) -> dict[str, Any]:
    benchmarks.gpu.main(["--tiny", "--device", "cpu", "--output", str(output), *more])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def record(benchmarks: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_kernels, "_kernels", flash_kernels.PackageKernels(standin.PACKAGE, "2.8.3", "cpu"))
        return tiny_run(benchmarks, tmp_path_factory.mktemp("results") / "gpu.json", "--cases", *SOME)


def test_what_is_recorded(record: dict[str, Any], benchmarks: SimpleNamespace) -> None:
    assert [case["name"] for case in record["cases"]] == list(SOME)
    assert record["environment"]["flash_attention_2"] == "flash_attn 2.8.3"
    assert record["environment"]["device"] == "cpu"
    for case in record["cases"]:
        subject, reference = (case["versions"][version] for version in benchmarks.harness.VERSIONS)
        assert len(subject["seconds"]["samples"]) == 2
        assert subject["share_of_limit"] * subject["seconds"]["median"] == pytest.approx(case["limit"]["seconds"])
        if case["name"] == "prefill_16k_flash":  # the reference has no kernels here
            assert "FlashAttention2" in reference["unavailable"]
            assert case["speedup"] is None
        else:
            assert len(reference["seconds"]["samples"]) == 2
            assert case["speedup"]["min"] <= case["speedup"]["max"]
            assert 0 < case["largest_relative_difference"] <= 0.08
    assert torch.get_default_device() == torch.device("cpu")


def test_the_plot(record: dict[str, Any], benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    measured, picture = tmp_path / "gpu.json", tmp_path / "plot.png"
    measured.write_text(json.dumps(record))
    benchmarks.plot.main([str(measured), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no speed-up to plot"):
        benchmarks.plot.draw_speedup({**record, "cases": [case for case in record["cases"] if not case["speedup"]]})


def test_versions_share_their_weights(benchmarks: SimpleNamespace) -> None:
    cases = benchmarks.gpu_cases
    models = cases.make_models(cases.TINY, 8, torch.bfloat16, torch.device("cpu"))
    ours, reference = (dict(model.named_parameters()) for model in models.values())
    assert ours.keys() == reference.keys()
    assert all(ours[name].data_ptr() == reference[name].data_ptr() for name in ours)


def test_costs_are_those_of_the_model(benchmarks: SimpleNamespace) -> None:
    case = benchmarks.gpu_cases.select(["decode_b8_8k"])[0]
    keys_and_values = 2 * 8 * 4096 * 8 * 128 * 32 * 2
    assert case.cost().bytes_moved == 16 * (2 * case.shape.parameters + keys_and_values)
    assert case.shape.parameters == pytest.approx(7.1e9, rel=0.01)


def test_out_of_memory_is_recorded(
    benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = benchmarks.gpu_cases.GpuPrefill.prepare

    def fail(self: Any, model: Any, version: str) -> Any:
        if version == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(self, model, version)

    monkeypatch.setattr(benchmarks.gpu_cases.GpuPrefill, "prepare", fail)
    (case,) = tiny_run(benchmarks, tmp_path / "gpu.json", "--cases", "prefill_4k_sdpa")["cases"]
    assert case["versions"]["reference"] == {"unavailable": "CUDA out of memory"}
    assert case["versions"]["mistral_hf"]["tokens_per_second"] > 0


def test_a_disagreement_fails_the_command(
    benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmarks.harness.TOLERANCES, "bfloat16", -1.0)
    with pytest.raises(SystemExit, match="Not counted:\nprefill_4k_sdpa: the results differ"):
        tiny_run(benchmarks, tmp_path / "gpu.json", "--cases", "prefill_4k_sdpa")


def test_options(benchmarks: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks.gpu.main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(benchmarks.gpu_cases.CASES)
    options = benchmarks.gpu.parse(
        ["--tiny", "--device", "cpu", "--layers", "1", "--attention", "eager", "--repeats", "3"]
    )
    for case in benchmarks.gpu.chosen(options):
        assert (case.shape.layers, case.attention, case.repeats) == (1, "eager", 3)
    for arguments, message in (
        (["--cases", "decode_b1"], "No case or group is called decode_b1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            benchmarks.gpu.parse(["--device", "cpu", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(benchmarks: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.gpu.parse([])
    assert "there is no CUDA device; --tiny --device cpu shows that it runs" in capsys.readouterr().err
