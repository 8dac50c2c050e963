"""Options of the Flax classes in Transformers 4 that have another form here, each with its new form.

`tests/flax/test_migration.py` lists every old form, those that work as they are too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEW_FORMS: dict[str, dict[str, str]] = {
    "from_pretrained": {
        "torch_dtype": "dtype='bfloat16', or None for that of the checkpoint",
        "ignore_mismatched_sizes": "nothing: weights of another head are left out or initialised, with a warning",
        "output_loading_info": "nothing: a warning names weights that are missing or left out",
        "proxies": "the environment variables HTTP_PROXY and HTTPS_PROXY",
        "resume_download": "nothing: downloads are always resumed",
        "subfolder": "the folder itself: from_pretrained('folder/subfolder')",
        "use_auth_token": "token=...",
    },
    "save_pretrained": {
        "push_to_hub": "model.push_to_hub('name') after it",
        "token": "model.push_to_hub('name', token=...)",
    },
    "a call": {
        "labels": "model.loss(input_ids, attention_mask, labels)",
        "deterministic": "train=False, the default",
        "init_cache": "past_key_values=model.init_cache(batch_size, max_length)",
    },
}


def check_old_options(where: str, options: Mapping[str, Any]) -> None:
    """Check that a call has no option in a form of before.

    Raises:
        ValueError: It has; the message says the new form.
    """
    for name in options:
        if name in NEW_FORMS[where]:
            raise ValueError(f"{where} has no option {name!r} any more. In its place: {NEW_FORMS[where][name]}.")
