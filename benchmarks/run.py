"""Measure named cases with mistral_hf and the library's own Mistral: ``python -m benchmarks.run --help``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import CASES, select
from .harness import (
    REFERENCE,
    SUBJECT,
    VERSIONS,
    AgreementError,
    Case,
    Limits,
    environment,
    measure,
    measure_limits,
    write_json,
)

RESULTS = Path(__file__).parent / "results"
COLUMNS = "{:<29}{:>12}{:>12}{:>10}{:>15}{:>12}{:>13}{:>13}{:>9}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options = parse(arguments)
    if options.list:
        for case in CASES:
            print(f"{case.group:<10}{case.name:<30}{case.title}")
        return
    record: dict[str, Any] = {"environment": environment(), "attention": options.attention}
    limits = measure_limits(1, 64, 2) if options.tiny else measure_limits()
    record |= {"limits": asdict(limits), "cases": []}
    print_header(record["environment"], limits)
    disagreements = []
    for case in chosen(options):
        try:
            result = measure(case, limits, options.attention, options.repeats, options.memory)
        except AgreementError as error:
            disagreements.append(str(error))
            continue
        record["cases"].append(result)
        print_result(result)
        if options.output:
            write_json(options.output, record)
    growth = growth_of_prefill(record["cases"])
    if growth:
        record["prefill_growth_8k_to_32k"] = growth
        print(f"prefill, 8k to 32k: {growth[SUBJECT]:.2f}x the time, reference {growth[REFERENCE]:.2f}x")
    if options.output:
        write_json(options.output, record)
        print(f"written: {options.output}")
    if disagreements:
        sys.exit("Not counted:\n" + "\n".join(disagreements))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; a wrong case name ends the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="names or groups (default: all)")
    parser.add_argument("--list", action="store_true", help="list groups and cases")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of each version (default: by case)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the model (default: by case, 30 or fewer)")
    parser.add_argument("--attention", default="sdpa", help="attention implementation of both (default: %(default)s)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: benchmarks/results/NAMES.json)")
    options = parser.parse_args(arguments)
    for name in ("repeats", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    try:
        select(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if options.output is None and not options.tiny:
        options.output = RESULTS / f"{'-'.join(options.cases) or 'all'}.json"
    return options


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases, in the sizes that were asked for."""
    cases = select(options.cases)
    if options.tiny:
        cases = [case.tiny() for case in cases]
    if options.layers:
        cases = [case.with_layers(options.layers) for case in cases]
    return cases


def growth_of_prefill(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By version, how many times longer 32k tokens take than 8k; empty unless both were measured."""
    by_name = {result["name"]: result["versions"] for result in results}
    if not {"prefill_8k", "prefill_32k"} <= by_name.keys():
        return {}
    short, long = by_name["prefill_8k"], by_name["prefill_32k"]
    return {version: long[version]["seconds"]["median"] / short[version]["seconds"]["median"] for version in VERSIONS}


def print_header(machine: dict[str, Any], limits: Limits) -> None:
    """The machine, its limits and the columns."""
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in limits.matrix_rate.items())
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}")
    print(
        f"limits: copy {limits.copy_bandwidth / 1e9:.1f} GB/s, read {limits.read_bandwidth / 1e9:.1f} GB/s,"
        f" matrix products in GFLOP/s: {rates}\n"
    )
    names = ("case", SUBJECT, "reference", "speedup", "min to max", "limit", "memory", "reference", "ratio")
    print(COLUMNS.format(*names), flush=True)


def print_result(result: dict[str, Any]) -> None:
    """One line: times of a run, how many times faster, the limit; then peak memory, and how many times less."""
    subject, reference = result["versions"][SUBJECT], result["versions"][REFERENCE]
    speedup = result["speedup"]
    cells = [result["name"], *(duration(version["seconds"]["median"]) for version in (subject, reference))]
    cells += [f"{speedup['median']:.2f}x", f"{speedup['min']:.2f} to {speedup['max']:.2f}"]
    cells.append(duration(result["limit"]["seconds"]))
    if "memory_ratio" in result:
        cells += [f"{version['peak_memory_bytes'] / 2**20:.0f} MiB" for version in (subject, reference)]
        cells.append(f"{result['memory_ratio']:.2f}x")
    print(COLUMNS.format(*cells, *[""] * (9 - len(cells))), flush=True)
    if result["details"]:
        print("  " + ", ".join(f"{name}: {value}" for name, value in result["details"].items()), flush=True)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
