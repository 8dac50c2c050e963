"""Which release of a package is installed."""

from importlib.metadata import version

from packaging.version import Version


def at_least(package: str, wanted: str, installed: str | None = None) -> bool:
    """Whether a package is of a version or later; by numbers, so 2.9 comes before 2.13."""
    return Version(installed or version(package)) >= Version(wanted)
