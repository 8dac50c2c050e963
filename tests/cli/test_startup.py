"""What a command imports before it needs it, and what Ctrl-C does meanwhile."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import mistral_hf
from mistral_hf.cli.streaming import statistics

HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "prompt_toolkit", "tqdm"}
SCRIPT = "from mistral_hf.__main__ import main\nmain()\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that an installation makes of the entry point."""
    file = tmp_path_factory.mktemp("bin") / "mistral-hf"
    file.write_text(SCRIPT)
    return file


def start(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=180, env={**os.environ, **environment}
    )


def imported(program: Sequence[str | Path], *arguments: str) -> tuple[set[str], str]:
    """The packages that a command imports, and what it prints."""
    result = start("-X", "importtime", *program, *arguments)
    assert result.returncode == 0, result.stderr[-1000:]
    modules = re.findall(r"^import time:.*\|\s*([\w.]+)$", result.stderr, re.MULTILINE)
    return {module.partition(".")[0] for module in modules}, result.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["chat", "--help"], ["run", "--", "true"]], ids=str
)
def test_a_command_that_loads_no_model_imports_nothing_heavy(script: Path, arguments: list[str]) -> None:
    packages, _ = imported([script], *arguments)
    assert "typer" in packages
    assert packages & HEAVY == set()


def test_the_package_runs_as_a_module() -> None:
    packages, output = imported(["-m", "mistral_hf"], "--version")
    assert output == f"mistral-hf {mistral_hf.__version__}\n"
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("/usr/bin/mistral-hf", ["python", "/usr/bin/mistral-hf", "info"], True),
        ("C:/Scripts/mistral-hf.exe", ["python", "C:/Scripts/mistral-hf.exe", "info"], True),
        ("-m", ["python", "-m", "mistral_hf", "info"], True),
        ("-m", ["python", "-m", "pytest", "mistral_hf"], False),
        ("-m", ["python", "-m", "mistral_hf_more", "info"], False),
        ("-c", ["python", "-c", "mistral_hf", "info"], False),
        ("mistral-hf.py", ["python", "mistral-hf.py", "info"], False),
        ("", ["python"], False),
    ],
)
def test_only_the_command_line_does_without_registration(
    monkeypatch: pytest.MonkeyPatch, program: str, words: list[str], expected: bool
) -> None:
    arguments = words[words.index("info") :] if "info" in words else words[3:]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert mistral_hf._is_command_line() is expected


def test_a_process_without_arguments_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an embedded interpreter may be."""
    monkeypatch.setattr(sys, "argv", [])
    assert not mistral_hf._is_command_line()


def test_a_command_registers_when_it_loads_a_model_whatever_the_encoding_is(script: Path) -> None:
    """An ASCII locale can neither hold the prompt nor show it: the bytes are taken as UTF-8, and signs replaced."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["generate", "é", "--max-new-tokens", "2", "--greedy"]
    result = start(script, *arguments, **environment)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr  # a note would name the library's class
    assert result.stdout.startswith("?")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
def test_ctrl_c_during_an_import_ends_the_command_on_the_spot(script: Path, tmp_path: Path) -> None:
    """An import may turn a KeyboardInterrupt into another error, or go on."""
    (tmp_path / "torch").mkdir()
    waiting = "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError\n"
    (tmp_path / "torch/__init__.py").write_text(f"import time\nprint('importing', flush=True)\n{waiting}")
    path = os.pathsep.join([str(tmp_path), str(Path(mistral_hf.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, script, "generate", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("generate - <&-", 2, "Standard input is closed"),
        ("chat --model x <&-", 2, "Standard input is closed"),
        ("generate $(printf '\\377')", 2, "It is not UTF-8"),
        ("--version >&-", 0, ""),
        ("--version 2>&-", 0, ""),
        ("--versions 2>&-", 2, ""),
        ("--version | true", 0, ""),
    ],
)
def test_closed_streams_and_bad_bytes_are_one_line(script: Path, line: str, code: int, message: str) -> None:
    result = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} {script} {line}"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (code, bool(message))
    assert message in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(script: Path) -> None:
    result = subprocess.run(
        ["sh", "-c", f"{sys.executable} {script} --version > /dev/full"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (2, "Error: [Errno 28] No space left on device\n")


def test_rates_leave_the_prompt_out() -> None:
    numbers = statistics([0.0, 2.0, 3.0, 4.0, 4.0], prompt_tokens=9, new_tokens=3)
    assert (numbers["seconds_to_first_token"], numbers["seconds"], numbers["tokens_per_second"]) == (2.0, 4.0, 1.0)
    assert statistics([0.0, 4.0], prompt_tokens=9, new_tokens=8)["tokens_per_second"] == 2.0
