"""Settings of LoRA adapters: the raw ``lora`` block <-> PEFT's ``adapter_config.json``. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    lora = params.get("lora")
    if not isinstance(lora, dict) or "scaling" not in lora:
        raise ValueError("params.json has no 'lora' block with 'scaling', the strength of the adapter: add it.")
    if lora.get("rank", rank) != rank:
        raise ValueError(f"params.json has lora rank {lora['rank']}, but the tensors have rank {rank}.")
    modules = sorted({LORA_TO_PEFT.to_target(name).split(".")[-3] for name in raw_names})
    alpha = float(lora["scaling"]) * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": float(lora.get("dropout", 0.0)),
        "target_modules": modules,
        "inference_mode": True,
        **_PLAIN_LORA,
    }


def peft_config_to_lora(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """Write the raw ``lora`` block for a PEFT adapter: undo `lora_config_to_peft`.

    Raises:
        ValueError: The adapter is not a plain LoRA of one rank.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json has peft_type={config.get('peft_type')!r}: only 'LORA' has a raw form.")
    for field, value in _PLAIN_LORA.items():
        if config.get(field, value) != value:
            raise ValueError(f"adapter_config.json has {field}={config[field]!r}: only {value!r} has a raw form.")
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"):
        if config.get(field):
            raise ValueError(f"adapter_config.json has {field}={config[field]!r}, which has no raw form.")
    if config.get("r") != rank:
        raise ValueError(f"adapter_config.json has rank {config.get('r')}, but the tensors have rank {rank}.")
    return {"rank": rank, "scaling": config["lora_alpha"] / rank, "dropout": config.get("lora_dropout", 0.0)}
