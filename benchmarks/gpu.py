"""Measure both versions on a GPU, and print the table of speed, limits and memory: ``python -m benchmarks.gpu --help``.

A model of the shape of Mistral-7B (random weights, bfloat16, W=4096) decodes and reads prompts with mistral_hf and with
the library's own Mistral, samples alternating in one process. ``--tiny --device cpu`` shows in seconds that all of it
runs; the times that it measures then mean nothing.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_hf.torch.flash_kernels import find_kernels

from .gpu_cases import CASES, MISTRAL_7B, TINY, GpuCase, make_models, select
from .harness import (
    REFERENCE,
    SUBJECT,
    TOLERANCES,
    AgreementError,
    Limits,
    Run,
    _best_seconds,
    _time_record,
    environment,
    interleave,
    ratio,
    write_json,
)

RESULT = Path(__file__).parent / "results" / "gpu.json"
COLUMNS = "{:<28}{:>12}{:>12}{:>9}{:>10}{:>10}{:>9}{:>12}{:>12}"
WINDOW = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options = parse(arguments)
    if options.list:
        for case in CASES:
            print(f"{case.group:<17}{case.name:<28}{case.title}")
        return
    device = torch.device(options.device)
    with default_device(device):
        limits = measure_limits(device, 1, 64) if options.tiny else measure_limits(device)
        cases = chosen(options)
        record = {"environment": machine(device), "limits": asdict(limits), "cases": []}
        print_header(record["environment"], limits)
        models = make_models(cases[0].shape, cases[0].window or WINDOW, torch.bfloat16, device)
        disagreements = []
        for case in cases:
            try:
                result = measure(case, models, limits, device)
            except AgreementError as error:
                disagreements.append(str(error))
                continue
            record["cases"].append(result)
            print_result(result)
            if options.output:
                write_json(options.output, record)
    if options.output:
        print(f"written: {options.output}; python -m benchmarks.plot {options.output} draws it")
    if disagreements:
        sys.exit("Not counted:\n" + "\n".join(disagreements))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what cannot work ends the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="names or groups (default: all)")
    parser.add_argument("--list", action="store_true", help="list groups and cases")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of each version (default: by case)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the model (default: 32)")
    parser.add_argument("--attention", metavar="NAME", help="attention implementation of all cases (default: by case)")
    parser.add_argument("--device", default="cuda", help="where to run (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: benchmarks/results/gpu.json)")
    options = parser.parse_args(arguments)
    for name in ("repeats", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available() and not options.list:
        parser.error(f"--device {options.device}: there is no CUDA device; --tiny --device cpu shows that it runs")
    try:
        select(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if options.output is None and not options.tiny:
        options.output = RESULT
    return options


def chosen(options: argparse.Namespace) -> list[GpuCase]:
    """The cases, in the sizes that were asked for."""
    cases = select(options.cases)
    if options.tiny:
        cases = [case.tiny() for case in cases]
    shape = replace(TINY if options.tiny else MISTRAL_7B, **({"layers": options.layers} if options.layers else {}))
    changes = {"repeats": options.repeats, "attention": options.attention}
    given = {name: value for name, value in changes.items() if value is not None}
    return [replace(case, shape=shape, **given) for case in cases]


@contextmanager
def default_device(device: torch.device) -> Iterator[None]:
    """Make new tensors there."""
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


def measure(case: GpuCase, models: dict[str, Any], limits: Limits, device: torch.device) -> dict[str, Any]:
    """Measure a case with both versions, as far as they can run it.

    Returns:
        The record of the case, ready for JSON: times in seconds, memory in bytes; and for a version that cannot run the
        case, why.

    Raises:
        AgreementError: The versions disagree.
    """
    runs: dict[str, Run] = {}
    versions: dict[str, dict[str, Any]] = {}
    for version, model in models.items():
        try:
            model.set_attn_implementation(case.attention)
            runs[version] = synchronized(case.prepare(model, version), device)
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            versions[version] = {"unavailable": str(error).splitlines()[0]}
    cost = case.cost()
    missing: dict[str, Run] = {version: nothing for version in models if version not in runs}
    seconds, difference = interleave(case.name, runs | missing, case.repeats, TOLERANCES[case.dtype])
    least, bound_by = limits.least_seconds(cost)
    for version, run in runs.items():
        versions[version] = _time_record(seconds[version], cost, least)
        if case.peak_memory and device.type == "cuda":
            versions[version]["peak_memory_bytes"] = peak_memory(run, device)
    runs.clear()
    gc.collect()
    torch.compiler.reset()
    return {
        "name": case.name,
        "title": case.title,
        "group": case.group,
        "settings": case.settings(),
        "versions": versions,
        "speedup": ratio(seconds[SUBJECT], seconds[REFERENCE]) if not missing else None,
        "limit": {"seconds": least, "bound_by": bound_by, **asdict(cost)},
        "largest_relative_difference": difference,
    }


def nothing() -> None:
    """In the place of a version that cannot run a case."""


def synchronized(run: Run, device: torch.device) -> Run:
    """The same, but it returns only when the device is done."""

    def wait_for() -> Tensor | None:
        result = run()
        wait(device)
        return result

    return wait_for


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run, device: torch.device) -> int:
    """Most bytes that are allocated during a run, the weights among them."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def measure_limits(device: torch.device, megabytes: int = 2048, order: int = 8192, trials: int = 10) -> Limits:
    """Measure copies and sums of tensors of that many megabytes, and bfloat16 matrix products of that order."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, order, order, device=device).bfloat16().unbind()

    def best(work: Callable[[], Any]) -> float:
        return _best_seconds(lambda: (work(), wait(device)), trials)

    return Limits(
        copy_bandwidth=2 * source.nbytes / best(lambda: target.copy_(source)),
        read_bandwidth=source.nbytes / best(source.sum),
        matrix_rate={"bfloat16": 2 * order**3 / best(lambda: a @ b)},
    )


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the software, the GPU and its kernels among them."""
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
    """Whose kernels mistral_hf uses for flash_attention_2."""
    try:
        return find_kernels().name
    except ImportError:
        return "none"


def print_header(found: dict[str, Any], limits: Limits) -> None:
    """The machine, its limits and the columns."""
    print(f"{found.get('gpu', found['cpu'])}, torch {found['torch']}, transformers {found['transformers']}")
    print(
        f"limits: copy {limits.copy_bandwidth / 1e9:.0f} GB/s, read {limits.read_bandwidth / 1e9:.0f} GB/s,"
        f" bfloat16 matrix products {limits.matrix_rate['bfloat16'] / 1e12:.1f} TFLOP/s; tokens/s and peak memory:\n"
    )
    names = ("case", SUBJECT, "reference", "speedup", "of limit", "limit", "memory", "reference", "seconds")
    print(COLUMNS.format(*names), flush=True)


def print_result(result: dict[str, Any]) -> None:
    """One line: tokens a second, how many times faster, the share of the limit; peak memory; seconds of a run."""
    subject, reference = (result["versions"][version] for version in (SUBJECT, REFERENCE))
    limit = result["limit"]
    speedup = result["speedup"]
    cells = [result["name"], *(rate(version) for version in (subject, reference))]
    cells.append(f"{speedup['median']:.2f}x" if speedup else "-")
    cells.append(f"{subject['share_of_limit']:.0%}" if "seconds" in subject else "-")
    cells.append(f"{limit['items'] / limit['seconds']:.0f}")
    cells += [memory(version) for version in (subject, reference)]
    cells.append(f"{subject['seconds']['median']:.4f}" if "seconds" in subject else "-")
    print(COLUMNS.format(*cells), flush=True)
    for version in (SUBJECT, REFERENCE):
        if "unavailable" in result["versions"][version]:
            print(f"  {version}: {result['versions'][version]['unavailable']}", flush=True)


def rate(version: dict[str, Any]) -> str:
    """Tokens a second, or a dash."""
    return f"{version['tokens_per_second']:.1f}" if "seconds" in version else "-"


def memory(version: dict[str, Any]) -> str:
    """Peak memory, or a dash."""
    return f"{version['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in version else "-"


if __name__ == "__main__":
    main()
