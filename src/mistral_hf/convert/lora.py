"""Settings of LoRA adapters: the raw ``lora`` block <-> PEFT's ``adapter_config.json``. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .params import Fields
from .tensors import LORA_TO_PEFT

# The settings of a plain LoRA, the only kind that has a raw form.
_PLAIN_LORA = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}


def lora_config_to_peft(params: dict[str, Any], rank: int, raw_names: Iterable[str]) -> dict[str, Any]:
    """Write PEFT's settings for a raw adapter.

    Both formats add ``scale * B A x``; the raw format stores the scale, PEFT stores ``alpha = scale * rank``.

    Args:
        params: The raw ``params.json``, with its ``lora`` block.
        rank: The rank of the matrices.
        raw_names: Names of the adapter's tensors, from which the modules are listed.

    Returns:
        The content of ``adapter_config.json``.

    Raises:
        ValueError: The block is missing or contradicts the tensors.
    """
    lora = Fields("params.json: ", params).inner("lora")
    if lora is None or "scaling" not in lora:
        raise ValueError("params.json has no 'lora' block with 'scaling', the strength of the adapter: add it.")
    if "rank" in lora and lora.whole("rank") != rank:
        raise ValueError(f"params.json has lora rank {lora.whole('rank')}, but the tensors have rank {rank}.")
    modules = sorted({LORA_TO_PEFT.to_target(name).split(".")[-3] for name in raw_names})
    alpha = lora.number("scaling") * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": _dropout(lora, "dropout"),
        "target_modules": modules,
        "inference_mode": True,
        **_PLAIN_LORA,
    }


def _dropout(fields: Fields, field: str) -> float:
    dropout = fields.number(field) if field in fields else 0.0
    if not 0 <= dropout < 1:
        raise fields.error(field, "must lie in [0, 1)")
    return dropout


def peft_config_to_lora(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """Write the raw ``lora`` block for a PEFT adapter: undo `lora_config_to_peft`.

    Raises:
        ValueError: The adapter is not a plain LoRA of one rank.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"adapter_config.json has peft_type={kind!r:.200}: only 'LORA' has a raw form.")
    for field, value in _PLAIN_LORA.items():
        if (given := config.get(field, value)) != value:
            raise ValueError(f"adapter_config.json has {field}={given!r:.200}: only {value!r} has a raw form.")
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"):
        if given := config.get(field):
            raise ValueError(f"adapter_config.json has {field}={given!r:.200}, which has no raw form.")
    fields = Fields("adapter_config.json: ", config)
    if fields.whole("r") != rank:
        raise ValueError(f"adapter_config.json has rank {fields.whole('r')}, but the tensors have rank {rank}.")
    alpha = fields.number("lora_alpha")
    return {"rank": rank, "scaling": alpha / rank, "dropout": _dropout(fields, "lora_dropout")}
