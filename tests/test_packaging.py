"""What is published: the source distribution, its description, and the types that a consumer sees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "conversion", "examples", "src", "tests")
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, without what runs and builds have left in it."""
    copy = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git" and not path.name.startswith(".coverage"):
            shutil.copyfile(path, copy / path.name)
    return copy


@pytest.fixture(scope="module")
def sdist(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    built = tmp_path_factory.mktemp("sdist")
    source = shutil.copytree(project, built / "project")
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, check=True, capture_output=True)
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(built, filter="data")
    return built / archive.name.removesuffix(".tar.gz")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_holds_every_file_of_the_repository(project: Path, sdist: Path) -> None:
    assert files(project) - files(sdist) == set()
    assert {name for name in files(sdist) - files(project) if ".egg-info/" not in name} == {"PKG-INFO"}


def run_tests(sdist: Path, *paths: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(sdist / "src"), "PYTEST_ADDOPTS": ""}
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(line, cwd=sdist, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_tests_run_from_the_source_distribution(sdist: Path) -> None:
    assert "passed" in run_tests(sdist, "tests/test_compatibility.py", "tests/checkpoints/test_json_file.py")


@pytest.mark.slow
def test_a_large_part_of_the_tests_runs_from_the_source_distribution(sdist: Path) -> None:
    parts = ("test_configuration.py", "test_readme.py", "test_loading.py", "checkpoints", "convert", "examples")
    assert "passed" in run_tests(sdist, *(f"tests/{part}" for part in parts))


def test_the_description_has_no_link_that_a_package_index_cannot_follow(sdist: Path) -> None:
    metadata = message_from_bytes((sdist / "PKG-INFO").read_bytes())
    description = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "mistral-hf generate" in description
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", description)
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []


CONSUMER = """
import mistral_hf
from mistral_hf import FlaxMistralForCausalLM, MistralConfig, MistralForCausalLM, MistralModel, TFMistralForCausalLM

reveal_type(MistralForCausalLM.from_pretrained("x"))
reveal_type(MistralModel.from_pretrained("x", output_loading_info=True))
reveal_type(FlaxMistralForCausalLM.from_pretrained("x"))
reveal_type(TFMistralForCausalLM.from_pretrained("x"))
reveal_type(MistralConfig(vocab_size=8))
reveal_type(mistral_hf.convert.convert_raw_to_hf("a", "b").notes)
mistral_hf.nonexistent
"""
TYPES = [
    "mistral_hf.modeling_mistral.MistralForCausalLM",
    "tuple[mistral_hf.modeling_mistral.MistralModel, dict[str, Any]]",
    "mistral_hf.modeling_flax_mistral.FlaxMistralForCausalLM",
    "mistral_hf.modeling_tf_mistral.TFMistralForCausalLM",
    "mistral_hf.configuration_mistral.MistralConfig",
    "list[str]",
]
# The libraries below are large, and some of them bring no types: their names count as Any.
MYPY = """
[mypy]
strict = true

[mypy-mistral_hf.*]
ignore_errors = true

[mypy-flax.*,huggingface_hub.*,jax.*,keras.*,ml_dtypes.*,numpy.*,optree.*,packaging.*,safetensors.*]
follow_imports = skip
ignore_missing_imports = true

[mypy-tensorflow.*,tokenizers.*,torch.*,tqdm.*,transformers.*,typer.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_consumer_sees_the_classes_and_no_unknown_attribute(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "consumer.py"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert re.findall(r'Revealed type is "(.*)"', done.stdout) == TYPES, done.stdout
    errors = [line.split("error: ")[1] for line in done.stdout.splitlines() if "error: " in line]
    assert [error.split("  [")[1] for error in errors] == ["attr-defined]"], done.stdout
