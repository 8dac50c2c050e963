"""``params.json`` of the raw format, checked and completed: pure functions on plain dicts.

Nothing is guessed: a value that ``params.json`` leaves out comes from `KNOWN_MODELS`, or the caller gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Params = dict[str, Any]

MOST_LAYERS = 10_000  # bounds the work that a small file can ask for before the weights are looked at
_FLOAT32 = 2.0**128  # numbers from here on are infinite in float32

# Fields of ``params.json`` that have one counterpart in ``config.json``.
FIELDS = (
    ("dim", "hidden_size"),
    ("n_layers", "num_hidden_layers"),
    ("n_heads", "num_attention_heads"),
    ("n_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("hidden_dim", "intermediate_size"),
    ("vocab_size", "vocab_size"),
    ("norm_eps", "rms_norm_eps"),
    ("tied_embeddings", "tie_word_embeddings"),
    ("sliding_window", "sliding_window"),
    ("max_seq_len", "max_position_embeddings"),
    ("rope_theta", "rope_theta"),
)

# Fields of ``yarn`` in ``params.json``, and their counterparts among Hugging Face's rope parameters.
YARN_FIELDS = (
    ("factor", "factor"),
    ("original_max_position_embeddings", "original_max_position_embeddings"),
    ("beta", "beta_fast"),
    ("alpha", "beta_slow"),
)

# Fields with the sizes of a model; ``n_kv_heads`` and ``head_dim`` may be left out.
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")

# Fields of models that are not dense Mistral text models.
_REFUSED = {
    "moe": "a mixture of experts, for which Transformers has classes such as MixtralForCausalLM",
    "multimodal": "a multimodal model",
    "quantization": "a quantized checkpoint",
    "q_lora_rank": "a model with latent attention",
    "kv_lora_rank": "a model with latent attention",
    "n_groups": "a mamba model",
}

VISION = "vision_encoder"  # the field of a vision tower, which is left out

_WITHOUT_EFFECT = {"max_batch_size", "lora", VISION}


class Fields:
    """The fields of a JSON object, read by type; a null counts as absent.

    Args:
        where: Names the object in an error, such as ``"params.json: yarn."``; the name of a field follows.
        content: The object.
        names: The spelling of fields in the file, if it is another than here.

    Raises:
        ValueError: From each method: the value is of another type or out of range; the message names file, field and
            value.
    """

    def __init__(self, where: str, content: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        self.where, self.names = where, names or {}
        self.values = {field: value for field, value in content.items() if value is not None}

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def whole(self, field: str, *, below: int = 2**63) -> int:
        """A positive whole number."""
        value = self.values.get(field)
        if type(value) is not int or not 1 <= value < below:
            limit = "" if below == 2**63 else f" below {below}"
            raise self.error(field, f"must be a positive whole number{limit}")
        return value

    def number(self, field: str) -> float:
        """A number that is finite in float32."""
        value: Any = self.values.get(field)
        if type(value) not in (int, float) or not abs(value) < _FLOAT32:
            raise self.error(field, "must be a finite number")
        return float(value)

    def positive(self, field: str) -> float:
        """A positive number that is finite in float32."""
        value: Any = self.values.get(field)
        if type(value) not in (int, float) or not 0 < value < _FLOAT32:
            raise self.error(field, "must be a positive number, and finite")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(field, default)
        if type(value) is not bool:
            raise self.error(field, "must be true or false")
        return value

    def inner(self, field: str, names: Mapping[str, str] | None = None) -> Fields | None:
        """The fields of an object within this one; None if it is absent or empty."""
        value = self.values.get(field, {})
        if not isinstance(value, dict):
            raise self.error(field, "must be an object")
        return Fields(f"{self.where}{self.names.get(field, field)}.", value, names) if value else None

    def error(self, field: str, rule: str) -> ValueError:
        """An error about a field that breaks a rule."""
        return ValueError(f"{self.where}{self.names.get(field, field)} {rule}, got {self.values.get(field)!r:.200}.")


class KnownModel(NamedTuple):
    """A published model, found by its sizes, and the values that its ``params.json`` may leave out.

    Attributes:
        names: The model's names, for a note.
        shape: ``(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size)``.
        rope_theta: As published in Hugging Face format.
        max_position_embeddings: As published in Hugging Face format.
        windowed: Whether it has a sliding window.
    """

    names: str
    shape: tuple[int, ...]
    rope_theta: float
    max_position_embeddings: int
    windowed: bool = False


KNOWN_MODELS = (
    KnownModel("Mistral 7B v0.1", (4096, 32, 32, 8, 128, 14336, 32000), 1e4, 32768, windowed=True),
    KnownModel("Mistral 7B v0.2", (4096, 32, 32, 8, 128, 14336, 32000), 1e6, 32768),
    KnownModel("Mistral 7B v0.3, Mathstral 7B", (4096, 32, 32, 8, 128, 14336, 32768), 1e6, 32768),
    KnownModel("Mistral Nemo 12B", (5120, 40, 32, 8, 128, 14336, 131072), 1e6, 131072),
    KnownModel("Codestral 22B, Mistral Small 22B", (6144, 56, 48, 8, 128, 16384, 32768), 1e6, 32768),
    KnownModel("Mistral Small 24B 2501", (5120, 40, 32, 8, 128, 32768, 131072), 1e8, 32768),
    KnownModel("Mistral Small 24B 3.1, Devstral Small", (5120, 40, 32, 8, 128, 32768, 131072), 1e9, 131072),
    KnownModel("Ministral 8B", (4096, 36, 32, 8, 128, 12288, 131072), 1e8, 32768, windowed=True),
    KnownModel("Ministral 3 3B", (3072, 26, 32, 8, 128, 9216, 131072), 1e6, 262144),
    KnownModel("Ministral 3 8B", (4096, 34, 32, 8, 128, 14336, 131072), 1e6, 262144),
    KnownModel("Ministral 3 14B", (5120, 40, 32, 8, 128, 16384, 131072), 1e9, 262144),
    KnownModel("Mistral Large 2 123B", (12288, 88, 96, 8, 128, 28672, 32768), 1e6, 131072),
)


def normalize_params(params: Params) -> Params:
    """Check a ``params.json`` and give every field its one spelling.

    Args:
        params: The parsed file.

    Returns:
        The sizes, ``norm_eps``, ``tied_embeddings``, and, None where absent, ``rope_theta``, ``max_seq_len``, ``yarn``,
        ``llama_4_scaling`` and ``sliding_window`` (an int, or a list with one entry for each layer if they differ).

    Raises:
        ValueError: The model is not a dense Mistral text model, a field is unknown, or a value is out of range.
    """
    return normalized(Fields("params.json: ", params))


def normalized(given: Fields) -> Params:
    """`normalize_params` for fields that may come from another file, by whose names an error calls them."""
    _check_kind(given.values)
    if "n_kv_heads" not in given:
        given.values["n_kv_heads"] = given.whole("n_heads")
    if "head_dim" not in given:
        given.values["head_dim"] = given.whole("dim") // given.whole("n_heads")
    normal: Params = {field: given.whole(field) for field in SIZES if field != "n_layers"}
    normal["n_layers"] = given.whole("n_layers", below=MOST_LAYERS)
    if normal["n_heads"] % normal["n_kv_heads"]:
        raise given.error("n_heads", f"is not a multiple of n_kv_heads={normal['n_kv_heads']}")
    if normal["head_dim"] % 2:
        raise given.error("head_dim", "is odd, so it has no rotary pairs")
    normal["norm_eps"] = given.positive("norm_eps")
    normal["tied_embeddings"] = given.flag("tied_embeddings", False)
    normal["rope_theta"] = given.positive("rope_theta") if "rope_theta" in given else None
    length = "max_seq_len" if "max_seq_len" in given else "max_position_embeddings"
    normal["max_seq_len"] = given.whole(length) if length in given else None
    normal["sliding_window"] = _window(given, normal["n_layers"])
    normal["yarn"] = _yarn(given, normal["rope_theta"])
    normal["llama_4_scaling"] = _query_scaling(given)
    return normal


_KNOWN_FIELDS = (
    {raw for raw, _ in FIELDS}
    | {"max_position_embeddings", "_sliding_window", "yarn", "llama_4_scaling", "model_type", "activation", "causal"}
    | _WITHOUT_EFFECT
)

_REQUIRED_VALUES = {"model_type": "transformer", "activation": "silu", "causal": True}


def _check_kind(given: Params) -> None:
    """Check that the fields are those of a dense Mistral text model."""
    for field, what in _REFUSED.items():
        if given.get(field):
            raise ValueError(f"params.json does not describe a dense Mistral text model, but {what} (field {field!r}).")
    for field, value in _REQUIRED_VALUES.items():
        if (found := given.get(field, value)) != value:
            raise ValueError(f"params.json has {field}={found!r:.200}; a dense Mistral text model has {value!r}.")
    unknown = [field for field in given.keys() - _KNOWN_FIELDS - _REFUSED.keys() if given[field]]
    if unknown:
        raise ValueError(f"params.json has fields that no dense Mistral text model has: {_listed(unknown)}.")


def _listed(names: Iterable[str]) -> str:
    return f"{', '.join(sorted(names)):.400}"


def _window(given: Fields, n_layers: int) -> int | list[int | None] | None:
    """The window of all layers, or a list with the window of each layer if they differ. Absent means null."""
    field = "sliding_window" if "sliding_window" in given else "_sliding_window"
    window = given.values.get(field)
    pattern = window if isinstance(window, list) else [window]
    fits = bool(pattern) and n_layers % len(pattern) == 0 and all(w in (None, "None") or _is_size(w) for w in pattern)
    if not fits:
        where = f"{given.where}{field}={window!r:.200}"
        raise ValueError(f"{where} is neither a size nor a pattern that fits {n_layers} layers.")
    windows = [None if w in (None, "None") else int(w) for w in pattern]
    return windows[0] if len(set(windows)) == 1 else windows * (n_layers // len(windows))


def _is_size(value: Any) -> bool:
    """Whether a value is a positive whole number, or text that says one."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        value = int(value)
    return type(value) is int and value >= 1


def _yarn(given: Fields, rope_theta: float | None) -> Params | None:
    """The ``yarn`` field with all of its parts, checked."""
    yarn = given.inner("yarn", dict(YARN_FIELDS) if given.names else None)
    if yarn is None:
        return None
    leftover = yarn.values.keys() - {raw for raw, _ in YARN_FIELDS} - {"apply_scale"}
    missing = {raw for raw, _ in YARN_FIELDS} - yarn.values.keys()
    if leftover or missing:
        raise ValueError(f"{yarn.where[:-1]} has unknown fields [{_listed(leftover)}] and lacks [{_listed(missing)}].")
    if rope_theta is not None and rope_theta <= 1:
        raise given.error("rope_theta", "must be more than 1 with yarn")
    return {
        "original_max_position_embeddings": yarn.whole("original_max_position_embeddings"),
        **{field: yarn.positive(field) for field in ("factor", "beta", "alpha")},
        "apply_scale": yarn.flag("apply_scale", True),
    }


def _query_scaling(given: Fields) -> Params | None:
    """The ``llama_4_scaling`` field, checked."""
    scaling = given.inner("llama_4_scaling", {"beta": "llama_4_scaling_beta"} if given.names else None)
    if scaling is None:
        return None
    original = scaling.whole("original_max_position_embeddings")
    return {"original_max_position_embeddings": original, "beta": scaling.positive("beta")}


def find_known_model(params: Params) -> KnownModel | None:
    """The published model that normalized `params` describe; None if none fits, or more than one."""
    shape = tuple(params[field] for field in SIZES)
    fits = [
        model
        for model in KNOWN_MODELS
        if model.shape == shape
        and model.windowed == (params["sliding_window"] is not None)
        and params["rope_theta"] in (None, model.rope_theta)
    ]
    return fits[0] if len(fits) == 1 else None


def complete_params(
    params: Params, max_position_embeddings: int | None = None, rope_theta: float | None = None
) -> tuple[Params, list[str]]:
    """Fill in the values that normalized `params` leave out, from the arguments or from `KNOWN_MODELS`.

    Args:
        params: From `normalize_params`.
        max_position_embeddings: Overrides ``max_seq_len``.
        rope_theta: Used if `params` have none.

    Returns:
        The complete params, and a line for each value that did not come from ``params.json``.

    Raises:
        ValueError: A value is missing and the model is not known, or the arguments contradict the file.
    """
    full = dict(params)
    notes: list[str] = []
    options = Fields("The option ", {"max_position_embeddings": max_position_embeddings, "rope_theta": rope_theta})
    if rope_theta is not None:
        full["rope_theta"] = options.positive("rope_theta")
        if params["rope_theta"] not in (None, full["rope_theta"]):
            raise ValueError(f"rope_theta={rope_theta} contradicts params.json, which has {params['rope_theta']}.")
    known = find_known_model(full)
    if full["rope_theta"] is None:
        full["rope_theta"], note = _looked_up(known, "rope_theta")
        notes.append(note)
    if max_position_embeddings is not None:
        full["max_seq_len"] = options.whole("max_position_embeddings")
        notes.append(f"max_position_embeddings = {max_position_embeddings}: as given")
    elif params["max_seq_len"] is None:
        full["max_seq_len"], note = _looked_up(known, "max_position_embeddings")
        notes.append(note)
    return full, notes


def _looked_up(known: KnownModel | None, field: str) -> tuple[Any, str]:
    """A field of a published model, and a note about it."""
    if known is None:
        raise ValueError(
            f"params.json does not give {field}, and its sizes are those of no known model, or of more than one: give"
            f" --{field} (the model card has it)."
        )
    value = getattr(known, field)
    return value, f"{field} = {value}: not in params.json; taken from {known.names}, which has the same sizes"


def params_difference(a: Params, b: Params) -> dict[str, tuple[Any, Any]]:
    """The fields in which two normalized params differ, as ``{field: (in a, in b)}``; empty if they mean the same."""
    fields = sorted(a.keys() | b.keys())
    return {field: (a.get(field), b.get(field)) for field in fields if a.get(field) != b.get(field)}
