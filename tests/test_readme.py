"""What the README shows works: its Python runs, its commands, options, extras and files exist."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from mistral_hf.bundled import BUNDLED_CHECKPOINT
from mistral_hf.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?:<!-- (hub|gpu) -->\n)?```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]
HUB_ID = re.compile(r'"mistralai/[\w.-]+"')
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def hub_stand_in(tmp_path_factory):
    """The bundled checkpoint with a chat template, in the place of those on the hub."""
    folder = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path_factory.mktemp("hub") / "checkpoint")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def first_snippet():
    names = {}
    exec(compile(SNIPPETS[0][1], "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, first_snippet, hub_stand_in):
    """Those of the hub stand alone, the others continue the first; those for a GPU are only compiled."""
    hub, code = SNIPPETS[number]
    if hub == "gpu":
        compile(code, "README.md", "exec")
        return
    assert bool(HUB_ID.search(code)) == bool(hub), "mark a snippet that loads from the hub with <!-- hub -->"
    for needed, module in (("BitsAndBytesConfig", "bitsandbytes"), ("flax_model", "flax"), ("tf_model", "tensorflow")):
        if needed in code:
            pytest.importorskip(module)
    names = {} if hub else dict(first_snippet)
    exec(compile(HUB_ID.sub(repr(str(hub_stand_in)), code), f"README.md snippet {number}", "exec"), names)
    if "flax_model" in code or "tf_model" in code:
        assert len(names["sequences"]) == 2
    elif "encode_conversation" in code:
        assert names["ids"][0] == 1
        assert len(names["ids"]) > 5
    else:
        model = names.get("ours", names.get("classifier", names.get("model")))
        assert type(model).__module__ == "mistral_hf.modeling_mistral"


def test_the_long_prompt_keeps_the_window_only(first_snippet, capsys):
    code = next(code for _, code in SNIPPETS if "prefill_chunk_size" in code)
    exec(code, dict(first_snippet))
    read, stored = re.findall(r"(\d+) tokens, ([\d,]+) bytes", capsys.readouterr().out)[0]
    model = first_snippet["model"]
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    assert int(read) > 1000
    assert int(stored.replace(",", "")) == config.sliding_window * a_token


def test_registration_goes_back_and_forth(first_snippet, capsys, registered):
    code = next(code for _, code in SNIPPETS if "unregister" in code)
    exec(code, dict(first_snippet))
    assert capsys.readouterr().out.split() == [
        "transformers.models.mistral.modeling_mistral",
        "mistral_hf.modeling_mistral",
    ]


def test_continuous_integration_runs_the_first_two_commands():
    printed = subprocess.run(["bash", ROOT / ".ci/run", "commands"], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == COMMANDS[:2]
    assert COMMANDS[0].startswith("pip install ")
    assert COMMANDS[1].startswith("pytest ")


def test_extras_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.search(r"\[([\w,]+)\]", COMMANDS[0])[1].split(","):
        assert extra in setup["options.extras_require"]


@pytest.mark.parametrize(
    "command", [part for line in COMMANDS for part in line.split(" && ") if part.startswith("mistral-hf")]
)
def test_commands_and_their_options_exist(command):
    name, *arguments = shlex.split(command.split(" < ")[0])[1:]
    known = {
        option
        for parameter in get_command(app).commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_files_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    scripts = re.findall(r"`(\w+\.py)`", README)
    assert linked
    assert scripts
    for path in (*linked, *(f"examples/{script}" for script in scripts)):
        assert (ROOT / path).is_file(), path
