"""Measure named cases with mistral_hf and the library's own Mistral: ``python -m benchmarks.run --help``."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from .cases import CASES
from .harness import REFERENCE, SUBJECT, VERSIONS, Case, environment, measure, measure_limits
from .report import finish, make_parser, measure_cases, output_path, parse_cases, print_header, print_result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options, cases = parse(arguments)
    record: dict[str, Any] = {"environment": environment(), "attention": options.attention}
    limits = measure_limits(tiny=options.tiny)
    record |= {"limits": asdict(limits), "cases": []}
    print_header(record["environment"], limits)
    measure_case = partial(measure, limits=limits, attention=options.attention, memory=options.memory)
    disagreements = measure_cases(cases, measure_case, record, print_result, options.output)
    growth = growth_of_prefill(record["cases"])
    if growth:
        record["prefill_growth_8k_to_32k"] = growth
        print(f"prefill, 8k to 32k: {growth[SUBJECT]:.2f}x the time, reference {growth[REFERENCE]:.2f}x")
    finish(options.output, record, disagreements)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """The options and the cases; a wrong option ends the program with a message."""
    parser = make_parser("run", __doc__, "--cases", "--list", "--repeats", "--layers", "--tiny", "--output")
    parser.add_argument("--attention", default="sdpa", help="attention implementation of both (default: %(default)s)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    options, cases = parse_cases(parser, arguments, CASES)
    options.output = output_path(options, "-".join(options.cases) or "all")
    return options, cases


def growth_of_prefill(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By version, how many times longer 32k tokens take than 8k; empty unless both were measured."""
    by_name = {result["name"]: result["versions"] for result in results}
    if not {"prefill_8k", "prefill_32k"} <= by_name.keys():
        return {}
    short, long = by_name["prefill_8k"], by_name["prefill_32k"]
    return {version: long[version]["seconds"]["median"] / short[version]["seconds"]["median"] for version in VERSIONS}


if __name__ == "__main__":
    main()
