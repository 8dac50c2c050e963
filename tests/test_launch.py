"""Programs that never import the package get its models: those started by `mistral-hf run`, and axolotl's plugin."""

import os
import signal
import subprocess
import sys
import sysconfig
import venv
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import mistral_hf
from mistral_hf import launch
from mistral_hf.cli import app

OURS = "mistral_hf.modeling_mistral"
PROGRAM = """
import multiprocessing, subprocess, sys
import transformers

def homes(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return type(model).__module__, getattr(transformers, model.config.architectures[0]).__module__

if __name__ == "__main__":
    folder, *children = sys.argv[1:]
    print("own", *homes(folder), flush=True)
    if children:
        subprocess.run([sys.executable, __file__, folder], check=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print("spawned", *pool.apply(homes, [folder]))
"""


def run_launched(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with the environment that `launch` gives it."""
    return subprocess.run(
        command,
        env=launch.with_registration({**os.environ, **environment}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# Loaded from its file, since importing the package takes seconds.
LAUNCH = "import runpy, sys; runpy.run_path(sys.argv[1])['launch'](sys.argv[2:])"


def start(*command: str | Path, **options: Any) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", LAUNCH, launch.__file__, *command]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stand_ins(folder: Path, **packages: str) -> str:
    """A folder with packages of the given code, for ``PYTHONPATH``."""
    for name, code in packages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)
    return str(folder)


def test_a_program_and_its_children_get_our_models(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = Path(sysconfig.get_path("scripts")) / "mistral-hf"
    result = subprocess.run(
        [command, "run", "--", script, checkpoint, "--children"], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [["own", OURS, OURS], ["own", OURS, OURS], ["spawned", OURS, OURS]]


def test_a_program_that_imports_the_package_first_works() -> None:
    code = "import mistral_hf, transformers; print(transformers.MistralForCausalLM.__module__)"
    result = run_launched(sys.executable, "-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, OURS), result.stderr


def test_a_process_without_transformers_imports_nothing_more() -> None:
    code = "import sys; print(sorted({'torch', 'mistral_hf', 'transformers', 'typing'} & {*sys.modules}))"
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result = run_launched(sys.executable, "-c", code)
    assert (result.stdout, result.stderr) == (plain.stdout, "")
    assert "torch" not in result.stdout


def test_registration_follows_the_first_import_of_transformers(bare_python: Path, tmp_path: Path) -> None:
    path = stand_ins(
        tmp_path,
        transformers="print('transformers'); ready = True",
        mistral_hf="import transformers; print('registered', transformers.ready)",
    )
    code = """
import importlib.util
print(importlib.util.find_spec("transformers").origin.endswith("__init__.py"))
print(importlib.util.find_spec("transformers").loader.__class__.__name__)
import json
print("before")
import transformers
importlib.reload(transformers)
"""
    result = run_launched(bare_python, "-c", code, PYTHONPATH=path)
    assert result.stdout.split("\n") == [
        *("True", "SourceFileLoader", "before", "transformers", "registered True", "transformers", ""),
    ]
    assert result.stderr == ""
    result = run_launched(bare_python, "-c", "import mistral_hf", PYTHONPATH=path)
    assert result.stdout.split("\n") == ["transformers", "registered True", ""]


@pytest.mark.parametrize("strict", ["0", "1"])
def test_an_environment_without_the_package_stays_silent(bare_python: Path, tmp_path: Path, strict: str) -> None:
    path = stand_ins(tmp_path, transformers="print('transformers')")
    result = run_launched(bare_python, "-c", "import transformers", PYTHONPATH=path, MISTRAL_HF_STRICT=strict)
    assert (result.returncode, result.stdout, result.stderr) == (0, "transformers\n", "")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("raise RuntimeError('It resolves\\nto another class.')", "RuntimeError: It resolves to another class."),
        ("import safetensors", "ModuleNotFoundError: No module named 'safetensors'"),
    ],
)
def test_a_failed_registration_is_one_line_or_an_error(
    bare_python: Path, tmp_path: Path, failure: str, reason: str
) -> None:
    path = stand_ins(tmp_path, transformers="", mistral_hf=failure)
    code = "try:\n    import transformers\nexcept ImportError:\n    pass\nprint('continued')"
    result = run_launched(bare_python, "-c", code, PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (0, "continued\n")
    expected = "mistral_hf could not be registered, so transformers uses its own Mistral: "
    assert result.stderr == f"{expected}{reason}\n"
    result = run_launched(bare_python, "-c", code, PYTHONPATH=path, MISTRAL_HF_STRICT="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith(f"RuntimeError: mistral_hf could not be registered: {reason}\n")


def test_the_shadowed_sitecustomize_runs(bare_python: Path, tmp_path: Path) -> None:
    path = stand_ins(tmp_path, transformers="", mistral_hf="print('registered')")
    shadowed = tmp_path / "sitecustomize.py"
    shadowed.write_text("print(__name__)")
    code = "import sitecustomize, transformers; print(sitecustomize.__file__)"
    result = run_launched(bare_python, "-c", code, PYTHONPATH=path)
    assert result.stdout.splitlines() == ["sitecustomize", "registered", str(shadowed)]
    shadowed.write_text("raise RuntimeError('broken')")
    result = run_launched(bare_python, "-c", "import transformers", PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (0, "registered\n")
    assert "RuntimeError: broken" in result.stderr  # Python itself reports it


def test_python_path_is_kept() -> None:
    startup, separator = str(launch.STARTUP), os.pathsep
    assert launch.with_registration({"A": "b"}) == {"A": "b", "PYTHONPATH": startup}
    assert launch.with_registration({"PYTHONPATH": ""}) == {"PYTHONPATH": startup}
    once = launch.with_registration({"PYTHONPATH": separator.join(["one", "", "two"])})
    assert once == {"PYTHONPATH": separator.join([startup, "one", "", "two"])}
    assert launch.with_registration(once) == once
    assert [path.name for path in launch.STARTUP.glob("*.py")] == ["sitecustomize.py"]


def test_scripts_and_modules_run_with_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = sys.executable
    assert launch.resolve(["train.py", "--lr", "1"]) == [python, "train.py", "--lr", "1"]
    assert launch.resolve(["-m", "lighteval", "x.py"]) == [python, "-m", "lighteval", "x.py"]
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.resolve(["tool", "-m"]) == [str(program), "-m"]
    assert launch.resolve([str(program)]) == [str(program)]
    assert Path(launch.resolve(["mistral-hf"])[0]).parent == Path(sysconfig.get_path("scripts"))  # not in PATH


@pytest.mark.skipif(os.name == "nt", reason="Windows has no exec")
def test_the_program_replaces_the_launcher() -> None:
    code = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda number, frame: print("interrupted", flush=True))
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
print(os.getpid(), sys.argv[1:], flush=True)
while True:
    time.sleep(0.01)
"""
    process = start("-c", code, "--model", "--", "x y")
    assert process.stdout is not None
    assert process.stdout.readline() == f"{process.pid} ['--model', '--', 'x y']\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.terminate()
    output = process.communicate(timeout=30)
    assert (process.returncode, output) == (5, ("", ""))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
def test_a_signal_that_ends_the_program_is_its_exit_code() -> None:
    process = start("-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_program_does_not_inherit_ignored_signals() -> None:
    process = start("grep", "SigIgn", "/proc/self/status")
    output, _ = process.communicate(timeout=30)
    assert int(output.split()[1], 16) & 1 << signal.SIGPIPE - 1 == 0


def test_an_unknown_command_is_one_line_and_127() -> None:
    process = start("no-such-program", "--help")
    output = process.communicate(timeout=30)
    message = "There is no command no-such-program: check its spelling, and that it is installed.\n"
    assert (process.returncode, output) == (127, ("", message))


def test_a_file_that_is_not_a_program_is_one_line_and_126(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o755)
    process = start(tmp_path / "text")
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output) == (126, "")
    assert error == f"{tmp_path / 'text'} cannot be run: Exec format error.\n"


def test_no_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["run"])
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


def test_options_after_the_command_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", commands.append)
    wanted = ["lm_eval", "--model", "hf", "--help", "--", "-x"]
    for arguments in (["--", *wanted], wanted, ["-m", *wanted]):
        assert CliRunner().invoke(app, ["run", *arguments]).exit_code == 0
    assert commands == [wanted, wanted, ["-m", *wanted]]


def test_a_child_process_gives_its_exit_code() -> None:
    """As on Windows, where the launcher waits for the program."""
    before = signal.getsignal(signal.SIGINT)
    code = "import os, sys; sys.exit(int(os.environ['WANTED']))"
    assert launch.run([sys.executable, "-c", code], {**os.environ, "WANTED": "4"}) == 4
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("registered")
def test_the_plugin_of_axolotl_registers_our_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_ins(tmp_path / "axolotl", integrations="")
    (tmp_path / "axolotl/integrations/base.py").write_text("class BasePlugin:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "mistral_hf.axolotl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    mistral_hf.unregister()
    assert transformers.MistralForCausalLM.__module__ != OURS
    plugin = import_module("mistral_hf.axolotl").MistralPlugin()
    assert type(plugin).__mro__[1].__module__ == "axolotl.integrations.base"
    plugin.register({"base_model": "folder"})
    assert transformers.MistralForCausalLM.__module__ == OURS
    for name in [name for name in sys.modules if name.startswith("axolotl")] + ["mistral_hf.axolotl"]:
        sys.modules.pop(name, None)
