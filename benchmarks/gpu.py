"""Measure both versions on a GPU and print speed, limits and memory: ``python -m benchmarks.gpu --help``.

A model of the shape of Mistral-7B (random weights, bfloat16, W=4096) decodes and reads prompts with mistral_hf and with
the library's own Mistral; samples alternate in one process. ``--tiny --device cpu`` checks in seconds that everything
runs; its times mean nothing.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mistral_hf.torch.flash_kernels import find_kernels

from .gpu_cases import CASES, GpuCase, make_models
from .harness import (
    REFERENCE,
    SUBJECT,
    TOLERANCES,
    VERSIONS,
    Limits,
    Run,
    case_record,
    environment,
    interleave,
    measure_limits,
    synchronize,
)
from .report import finish, make_parser, measure_cases, output_path, parse_cases, print_header

COLUMNS = "{:<28}{:>12}{:>12}{:>9}{:>10}{:>10}{:>9}{:>12}{:>12}"
TITLES = ("case", SUBJECT, REFERENCE, "speedup", "of limit", "limit", "memory", REFERENCE, "seconds")
WINDOW = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options, cases = parse(arguments)
    device = torch.device(options.device)
    with device:  # new tensors are made on it
        limits = measure_limits(device, ("bfloat16",), options.tiny)
        record: dict[str, Any] = {"environment": machine(device), "limits": asdict(limits), "cases": []}
        print("mistral_hf, reference and limit in tokens/s; memory is the peak, weights included")
        print_header(record["environment"], limits, COLUMNS, TITLES)
        models = make_models(cases[0].shape, cases[0].window or WINDOW, torch.bfloat16, device)
        measure_case = partial(measure, models=models, limits=limits, device=device)
        disagreements = measure_cases(cases, measure_case, record, print_result, options.output)
    if options.output:
        print(f"python -m benchmarks.plot {options.output} draws the results")
    finish(options.output, record, disagreements)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[GpuCase]]:
    """The options and the cases; options that cannot work end the program with a message."""
    parser = make_parser("gpu", __doc__, "--cases", "--list", "--repeats", "--layers", "--tiny", "--output")
    parser.add_argument("--attention", metavar="NAME", help="attention implementation of all cases (default: by case)")
    parser.add_argument("--device", default="cuda", help="where to run (default: %(default)s)")
    options, cases = parse_cases(parser, arguments, CASES)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {options.device}: there is no CUDA device; --tiny --device cpu checks that the benchmark runs"
        )
    options.output = output_path(options, "gpu")
    return options, [replace(case, attention=options.attention or case.attention) for case in cases]


def measure(case: GpuCase, models: dict[str, Any], limits: Limits, device: torch.device) -> dict[str, Any]:
    """Measure a case with each version that can run it.

    Returns:
        The record of the case, ready for JSON: times in seconds, memory in bytes; for a version that cannot run the
        case, the reason.

    Raises:
        AgreementError: The versions disagree.
    """
    runs: dict[str, Run] = {}
    unavailable: dict[str, dict[str, str]] = {}
    for version, model in models.items():
        try:
            model.set_attn_implementation(case.attention)
            runs[version] = synchronized(case.prepare(model, version), device)
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            unavailable[version] = {"unavailable": str(error).splitlines()[0]}
    seconds, difference = interleave(case.name, runs, case.repeats, TOLERANCES[case.dtype])
    record = case_record(case, limits, seconds, difference)
    if case.peak_memory and device.type == "cuda":
        for version, run in runs.items():
            record["versions"][version]["peak_memory_bytes"] = peak_memory(run, device)
    record["versions"] |= unavailable
    runs.clear()
    gc.collect()
    torch.compiler.reset()
    return record


def synchronized(run: Run, device: torch.device) -> Run:
    """The same function, which returns only when the device has finished."""

    def run_and_wait() -> Tensor | None:
        result = run()
        synchronize(device)
        return result

    return run_and_wait


def peak_memory(run: Run, device: torch.device) -> int:
    """The largest number of bytes allocated during a run, with the weights."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the software, with the GPU and its kernels."""
    found = environment()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found | {"device": device.type, "flash_attention_2": flash_kernels_name()}


def flash_kernels_name() -> str:
    """Name of the kernels that mistral_hf uses for flash_attention_2."""
    try:
        return find_kernels().name
    except ImportError:
        return "none"


def print_result(result: dict[str, Any]) -> None:
    """Print tokens/s, the speedup, the share of the limit, the peak memory and the seconds of a run."""
    versions, limit, speedup = result["versions"], result["limit"], result["speedup"]
    subject = versions[SUBJECT]
    cells = [result["name"], *(rate(versions[version]) for version in VERSIONS)]
    cells.append(f"{speedup['median']:.2f}x" if speedup else "-")
    cells.append(f"{subject['share_of_limit']:.0%}" if "seconds" in subject else "-")
    cells.append(f"{limit['items'] / limit['seconds']:.0f}")
    cells += [memory(versions[version]) for version in VERSIONS]
    cells.append(f"{subject['seconds']['median']:.4f}" if "seconds" in subject else "-")
    print(COLUMNS.format(*cells), flush=True)
    for version in VERSIONS:
        if "unavailable" in versions[version]:
            print(f"  {version}: {versions[version]['unavailable']}", flush=True)


def rate(version: dict[str, Any]) -> str:
    """Tokens a second, or a dash."""
    return f"{version['tokens_per_second']:.1f}" if "seconds" in version else "-"


def memory(version: dict[str, Any]) -> str:
    """Peak memory, or a dash."""
    return f"{version['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in version else "-"


if __name__ == "__main__":
    main()
