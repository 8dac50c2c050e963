"""``config.json`` of Hugging Face <-> the params of the raw format: pure functions on plain dicts."""

from __future__ import annotations

import math
from typing import Any

from .params import FIELDS, MOST_LAYERS, SIZES, YARN_FIELDS, Fields, Params, normalized

Config = dict[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers in ``config.json``


def params_to_config(params: Params, dtype: str) -> Config:
    """Write complete `params` as a ``config.json``.

    The spelling is the one that every release of the library and the servers built on it can read (``rope_theta`` and
    ``rope_scaling`` at top level, ``torch_dtype``). The model type is ``mistral``; ``ministral`` if only some layers
    have a window, and ``ministral3`` with Llama-4 style scaling of the queries.

    Args:
        params: From `complete_params`.
        dtype: The name of the weights' dtype, such as ``"bfloat16"``.

    Returns:
        The content of ``config.json``.

    Raises:
        ValueError: No model type has these windows, or this scaling of the queries.
    """
    config: Config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{hf: params[raw] for raw, hf in FIELDS},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "transformers_version": "5.0.0",  # the library warns of a wrong tekken pattern in older files
    }
    windows, yarn, scaling = params["sliding_window"], params["yarn"], params["llama_4_scaling"]
    if yarn:
        config["rope_scaling"] = _yarn_to_rope(yarn)
    if isinstance(windows, list):
        config |= {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", **_layer_types(windows)}
    if scaling:
        if isinstance(windows, list):
            raise ValueError(f"params.json: no model type has both llama_4_scaling={scaling} and windows by layer.")
        original = scaling["original_max_position_embeddings"]
        if not yarn or yarn["original_max_position_embeddings"] != original:
            raise ValueError(f"params.json: llama_4_scaling={scaling} needs yarn with the same original positions.")
        rope = _ministral3_rope(yarn, scaling) | {"rope_theta": config.pop("rope_theta")}
        del config["rope_scaling"]
        config |= {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "rope_parameters": rope}
    return config


def _layer_types(windows: list[int | None]) -> Config:
    """The fields of ``config.json`` for the windows of the layers, None for full attention."""
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise ValueError(f"params.json: the layers have windows of {sizes[:8]}, but a model type has one size for all.")
    return {"sliding_window": sizes[0], "layer_types": [FULL if window is None else SLIDING for window in windows]}


def _yarn_to_rope(yarn: Params) -> Config:
    """Hugging Face rope parameters for the ``yarn`` field of the raw format."""
    rope: Config = {"rope_type": "yarn", **{hf: yarn[raw] for raw, hf in YARN_FIELDS}}
    return rope if yarn["apply_scale"] else rope | {"attention_factor": 1.0}


def _ministral3_rope(yarn: Params, scaling: Params) -> Config:
    """The same for a ``ministral3`` model, with the fields that the library writes for it."""
    rope = _yarn_to_rope(yarn)
    rope.pop("attention_factor", None)
    mscale = {"mscale": 1.0, "mscale_all_dim": 0.0 if yarn["apply_scale"] else 1.0}
    return rope | mscale | {"llama_4_scaling_beta": scaling["beta"]}


# Fields of ``config.json`` that must be absent, empty or false.
_WITHOUT_RAW_FORM = {
    "attention_bias": "biases",
    "mlp_bias": "biases",
    "quantization_config": "quantized weights",
}

# The library's values for fields that ``config.json`` leaves out, by model type.
_MISTRAL = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_DEFAULTS: dict[str, Config] = {
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": {
        **_MISTRAL,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 262144,
        "head_dim": 128,
        "rope_parameters": _MINISTRAL3_ROPE,
    },
}


def config_to_params(config: Config) -> Params:
    """Read a ``config.json`` as complete, normalized params: undo `params_to_config`.

    Raises:
        ValueError: The model is not a dense Mistral, or has something that the raw format cannot express.
    """
    _check_kind(config)
    model_type = config["model_type"]
    full = _DEFAULTS[model_type] | config
    spellings = {name: Fields("config.json: ", full).inner(name) for name in ("rope_scaling", "rope_parameters")}
    spelling = "rope_scaling" if spellings["rope_scaling"] else "rope_parameters"  # as the library prefers them
    rope = spellings[spelling] or Fields("", {})
    rope_theta = rope.values.pop("rope_theta", full["rope_theta"])
    yarn, scaling = _rope_to_yarn(rope, scaled=model_type == "ministral3")
    raw = {raw: full.get(hf) for raw, hf in FIELDS}
    raw |= {"rope_theta": rope_theta, "yarn": yarn, "llama_4_scaling": scaling}
    if full.get("layer_types") is not None:
        raw["sliding_window"] = _windows_by_layer(full)
    return normalized(Fields("config.json: ", raw, dict(FIELDS) | {"yarn": spelling, "llama_4_scaling": spelling}))


def _check_kind(config: Config) -> None:
    """Check that it is the configuration of a dense Mistral text model without anything that has no raw form."""
    model_type = config.get("model_type")
    if model_type not in [*_DEFAULTS]:  # it may be of any type
        kinds = ", ".join(map(repr, _DEFAULTS))
        raise ValueError(
            f"config.json has model_type={model_type!r:.200}, but only {kinds} have a raw form here: the Auto classes"
            " load other types in the library's classes."
        )
    missing = [hf for raw, hf in FIELDS if raw in SIZES and raw not in ("n_kv_heads", "head_dim") and hf not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: copy it again.")
    for field, what in _WITHOUT_RAW_FORM.items():
        if config.get(field):
            raise ValueError(f"config.json has {field}={config[field]!r:.200}, but the raw format has no {what}.")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json has hidden_act={config['hidden_act']!r:.200}: the raw format has only 'silu'.")


def _windows_by_layer(config: Config) -> list[int | None]:
    """The window of every layer, None for full attention."""
    fields = Fields("config.json: ", config)
    kinds, n_layers = config["layer_types"], fields.whole("num_hidden_layers", below=MOST_LAYERS)
    if not isinstance(kinds, list) or len(kinds) < n_layers or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise fields.error("layer_types", f"must give {SLIDING!r} or {FULL!r} for each of {n_layers} layers")
    kinds = kinds[:n_layers]
    window = fields.whole("sliding_window") if SLIDING in kinds else None
    return [window if kind == SLIDING else None for kind in kinds]


def _rope_to_yarn(rope: Fields, *, scaled: bool) -> tuple[Params | None, Params | None]:
    """The ``yarn`` and ``llama_4_scaling`` fields of the raw format for Hugging Face rope parameters.

    Args:
        rope: The parameters without ``rope_theta``.
        scaled: Whether the model type scales its queries.
    """
    left = dict(rope.values)
    kinds = [kind for kind in (left.pop("rope_type", None), left.pop("type", None)) if kind]
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json has rope_type={kind!r:.200}: the raw format has only 'default' and 'yarn'.")
    if by_layer := [name for name, value in left.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json has rope parameters for {by_layer[0]!r:.200}: the raw format has one for all.")
    beta = left.pop("llama_4_scaling_beta", None)
    if beta and (kind == "default" or not scaled):
        raise rope.error("llama_4_scaling_beta", "has an effect only in a 'ministral3' model with yarn")
    if kind == "default":
        return None, None
    yarn = {raw: left.pop(hf, None) for raw, hf in YARN_FIELDS}
    yarn |= {raw: default for raw, default in (("beta", 32.0), ("alpha", 1.0)) if yarn[raw] is None}
    yarn["apply_scale"] = _applies_scale(rope)
    without_effect = ("attention_factor", "mscale", "mscale_all_dim", "max_position_embeddings", "truncate")
    if (leftover := left.keys() - {*without_effect}) or not left.get("truncate", True):
        given = {name: left[name] for name in sorted(leftover | {"truncate"} & left.keys())}
        raise ValueError(f"config.json has yarn parameters without a raw form: {given!r:.400}.")
    original = yarn["original_max_position_embeddings"]
    return yarn, {"original_max_position_embeddings": original, "beta": beta} if beta else None


def _applies_scale(rope: Fields) -> bool:
    """Whether yarn multiplies cos and sin by ``0.1 log(factor) + 1``, rather than by 1.

    The library takes ``attention_factor``, or else computes it from ``mscale`` and ``mscale_all_dim`` if both are given
    and not 0, or else from ``factor`` alone.
    """
    factor = rope.positive("factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    weights = [rope.number(name) if name in rope else 0.0 for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" in rope:
        given = rope.positive("attention_factor")
    elif all(weights):
        if min(map(scale, weights)) <= 0:
            raise rope.error("mscale", "and mscale_all_dim must not be negative")
        given = scale(weights[0]) / scale(weights[1])
    else:
        return True
    for applied, expected in ((False, 1.0), (True, scale(1))):
        if math.isclose(given, expected, rel_tol=1e-9):
            return applied
    name = "attention_factor" if "attention_factor" in rope else "mscale"
    factors = f"1 and {scale(1):.6g}"
    raise rope.error(name, f"makes yarn multiply by {given:.6g}, while the raw format has only {factors}")
