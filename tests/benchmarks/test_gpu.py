"""The GPU benchmark runs end to end on the CPU in tiny sizes; the times that it measures there mean nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, harness, plot
from benchmarks.gpu_cases import CASES, GpuPrefill, make_models
from benchmarks.models import TINY
from benchmarks.report import select
from mistral_hf.torch import flash_kernels
from tests.helpers import fake_flash_kernels

SOME = ("decode_b8_8k", "decode_b8_32k_compiled", "prefill_4k_sdpa", "prefill_16k_flash", "prefill_64k_sdpa_chunked")


def tiny_run(output: Path, *more: str) -> dict[str, Any]:
    gpu.main(["--tiny", "--device", "cpu", "--output", str(output), *more])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flash_kernels, "_kernels", flash_kernels.PackageKernels(fake_flash_kernels.PACKAGE, "2.8.3", "cpu")
        )
        return tiny_run(tmp_path_factory.mktemp("results") / "gpu.json", "--cases", *SOME)


def test_times_are_recorded_and_why_a_version_has_none(record: dict[str, Any]) -> None:
    assert [case["name"] for case in record["cases"]] == list(SOME)
    assert record["environment"]["flash_attention_2"] == "flash_attn 2.8.3"
    assert record["environment"]["device"] == "cpu"
    for case in record["cases"]:
        subject, reference = (case["versions"][version] for version in harness.VERSIONS)
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


def test_plot_draws_speedups_and_refuses_results_without_one(record: dict[str, Any], tmp_path: Path) -> None:
    measured, picture = tmp_path / "gpu.json", tmp_path / "plot.png"
    measured.write_text(json.dumps(record))
    plot.main([str(measured), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no speed-up to plot"):
        plot.draw_speedup({**record, "cases": [case for case in record["cases"] if not case["speedup"]]})


def test_versions_share_their_weights() -> None:
    models = make_models(TINY, 8, torch.bfloat16, torch.device("cpu"))
    ours, reference = (dict(model.named_parameters()) for model in models.values())
    assert ours.keys() == reference.keys()
    assert all(ours[name].data_ptr() == reference[name].data_ptr() for name in ours)


@pytest.fixture
def other_default_device() -> Iterator[torch.device]:
    """A default device that is not the CPU."""
    with torch.device("meta") as device:
        yield device


def test_ids_are_drawn_on_the_cpu_and_moved_to_the_default_device(
    other_default_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, a generator of the CPU draws on the CPU only; `randint` raises there for any other device."""
    randint = torch.randint

    def checked(*sizes: Any, generator: torch.Generator, device: torch.device | None = None) -> Tensor:
        assert (device or torch.get_default_device()) == generator.device
        return randint(*sizes, generator=generator, device=device)

    monkeypatch.setattr(torch, "randint", checked)
    assert CASES[0].ids(4).device == other_default_device


def test_costs_are_those_of_the_model() -> None:
    case = select(["decode_b8_8k"], CASES)[0]
    keys_and_values = 2 * 8 * 4096 * 8 * 128 * 32 * 2
    assert case.cost().bytes_moved == 16 * (2 * case.shape.parameters + keys_and_values)
    assert case.shape.parameters == pytest.approx(7.1e9, rel=0.01)


def test_out_of_memory_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = GpuPrefill.prepare

    def fail(self: GpuPrefill, model: Any, version: str) -> harness.Run:
        if version == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(self, model, version)

    monkeypatch.setattr(GpuPrefill, "prepare", fail)
    (case,) = tiny_run(tmp_path / "gpu.json", "--cases", "prefill_4k_sdpa")["cases"]
    assert case["versions"]["reference"] == {"unavailable": "CUDA out of memory"}
    assert case["versions"]["mistral_hf"]["tokens_per_second"] > 0


def test_a_disagreement_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.TOLERANCES, "bfloat16", -1.0)
    with pytest.raises(SystemExit, match="Not counted:\nprefill_4k_sdpa: mistral_hf and reference differ"):
        tiny_run(tmp_path / "gpu.json", "--cases", "prefill_4k_sdpa")


def test_list_prints_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--list"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)


def test_options_change_every_case() -> None:
    _, cases = gpu.parse(["--tiny", "--device", "cpu", "--layers", "1", "--attention", "eager", "--repeats", "3"])
    assert len(cases) == len(CASES)
    for case in cases:
        assert (case.shape.layers, case.attention, case.repeats) == (1, "eager", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "decode_b1"], "No case or group is called decode_b1"),
        (["--repeats", "0"], "argument --repeats: 0 is too small: give at least 1"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "there is no CUDA device; --tiny --device cpu checks that the benchmark runs" in capsys.readouterr().err
