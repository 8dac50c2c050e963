"""Command lines, tables and result files of the benchmarks."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .harness import REFERENCE, SUBJECT, VERSIONS, AgreementError, Case, Limits

RESULTS = Path(__file__).parent / "results"
CaseT = TypeVar("CaseT", bound=Case)
COLUMNS = "{:<29}{:>12}{:>12}{:>10}{:>15}{:>12}{:>13}{:>13}{:>9}"
TITLES = ("case", SUBJECT, REFERENCE, "speedup", "min to max", "limit", "memory", REFERENCE, "ratio")


def positive(text: str) -> int:
    """A number of at least 1, as the type of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small: give at least 1")
    return number


OPTIONS: dict[str, dict[str, Any]] = {
    "--cases": {"nargs": "+", "default": [], "metavar": "NAME", "help": "names or groups (default: all)"},
    "--list": {"action": "store_true", "help": "list groups and cases"},
    "--repeats": {"type": positive, "metavar": "N", "help": "samples of each version (default: set by the case)"},
    "--layers": {"type": positive, "metavar": "N", "help": "layers of the model (default: set by the case)"},
    "--tiny": {"action": "store_true", "help": "use tiny sizes, to check that everything runs"},
    "--output": {"type": Path, "metavar": "FILE", "help": "JSON (default: in benchmarks/results; none with --tiny)"},
}


def make_parser(command: str, description: str | None, *options: str) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks.COMMAND``, with some of the `OPTIONS`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=description)
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def parse_cases(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, cases: Sequence[CaseT]
) -> tuple[argparse.Namespace, list[CaseT]]:
    """The options, and the cases that they name, in the sizes that they set; ``--list`` lists them and exits."""
    options = parser.parse_args(arguments)
    if options.list:
        for case in cases:
            print(f"{case.group:<17}{case.name:<30}{case.title}")
        parser.exit()
    try:
        return options, resized(select(options.cases, cases), options)
    except ValueError as error:
        parser.error(str(error))


def select(names: Sequence[str], cases: Sequence[CaseT]) -> list[CaseT]:
    """The cases with these names or groups, in their own order; without names, all of them.

    Raises:
        ValueError: A name belongs to neither a case nor a group.
    """
    known = {case.name for case in cases} | {case.group for case in cases}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"No case or group is called {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")
    return [case for case in cases if not names or case.name in names or case.group in names]


def resized(cases: Iterable[CaseT], options: argparse.Namespace) -> list[CaseT]:
    """The cases with the sizes of ``--tiny``, ``--layers`` and ``--repeats``, where a command has these options."""
    layers = getattr(options, "layers", None)
    found: list[Any] = [case.tiny() if options.tiny else case for case in cases]
    found = [case.with_layers(layers) if layers else case for case in found]
    return [replace(case, repeats=options.repeats) if options.repeats else case for case in found]


def results_path(name: str) -> Path:
    """The file of results with this name."""
    return RESULTS / f"{name}.json"


def output_path(options: argparse.Namespace, name: str) -> Path | None:
    """The file to write: that of ``--output``, else the results of this name; none with ``--tiny``."""
    return options.output or (None if options.tiny else results_path(name))


def read_json(path: Path | None) -> dict[str, Any]:
    """Earlier results, which are empty without such a file."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Replace the file in one step; do nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(path)


def measure_cases(
    cases: Iterable[CaseT],
    measure: Callable[[CaseT], dict[str, Any]],
    results: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    path: Path | None,
) -> list[str]:
    """Measure one case after another; add its record to the results' ``"cases"``, show it and write the results.

    Returns:
        The errors of cases whose versions disagree; these have no record.
    """
    disagreements = []
    for case in cases:
        try:
            record = measure(case)
        except AgreementError as error:
            disagreements.append(str(error))
            continue
        results["cases"].append(record)
        show(record)
        write_json(path, results)
    return disagreements


def finish(path: Path | None, results: Mapping[str, Any], disagreements: Sequence[str] = ()) -> None:
    """Write the results, print where they are, and fail if versions disagreed.

    Raises:
        SystemExit: There are disagreements.
    """
    write_json(path, results)
    if path:
        print(f"written: {path}")
    if disagreements:
        sys.exit("Not counted:\n" + "\n".join(disagreements))


def print_header(
    machine: Mapping[str, Any], limits: Limits, columns: str = COLUMNS, titles: Sequence[str] = TITLES
) -> None:
    """Print the machine, its limits and the titles of the table."""
    print(
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads,"
        f" torch {machine['torch']}, transformers {machine['transformers']}"
    )
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in limits.matrix_rate.items())
    print(
        f"limits: copy {limits.copy_bandwidth / 1e9:.1f} GB/s, read {limits.read_bandwidth / 1e9:.1f} GB/s,"
        f" matrix products in GFLOP/s: {rates}\n"
    )
    print(columns.format(*titles), flush=True)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the times of a run, the speedup and the limit; then the peak memory and how many times less it is."""
    versions, speedup = [result["versions"][version] for version in VERSIONS], result["speedup"]
    cells = [result["name"], *(duration(version["seconds"]["median"]) for version in versions)]
    cells += [f"{speedup['median']:.2f}x", f"{speedup['min']:.2f} to {speedup['max']:.2f}"]
    cells.append(duration(result["limit"]["seconds"]))
    if "memory_ratio" in result:
        cells += [f"{version['peak_memory_bytes'] / 2**20:.0f} MiB" for version in versions]
        cells.append(f"{result['memory_ratio']:.2f}x")
    print(COLUMNS.format(*cells, *[""] * (len(TITLES) - len(cells))), flush=True)
    if result["details"]:
        print("  " + ", ".join(f"{name}: {value}" for name, value in result["details"].items()), flush=True)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
