"""A small checkpoint to chat with: the bundled one with a chat template."""

import shutil
from pathlib import Path

import pytest

from mistral_hf.bundled import BUNDLED_CHECKPOINT

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if 'refuse' in message['content'] %}{{ raise_exception('System prompts are not supported.') }}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path_factory.mktemp("chat") / "checkpoint"))
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return copy
