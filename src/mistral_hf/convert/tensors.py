"""Raw Mistral weights <-> Hugging Face: tensor names, shapes, and the rotary permutation.

Pure functions on names, shapes and plain dicts: no file access and no framework import. Arrays need only ``reshape``
and ``swapaxes``, which NumPy, PyTorch and JAX share.

Legend: H heads (query or key/value heads), D head_dim.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

Params = dict[str, Any]
Shape = tuple[int, ...]
Array: TypeAlias = Any  # a NumPy, PyTorch or JAX array


class NameTable:
    """A one-to-one table between two naming schemes, which translates in both directions.

    ``{n}`` stands for a number, usually that of a layer, which stays the same.

    Args:
        pairs: ``(source, target)`` name patterns.

    Raises:
        ValueError: A name repeats.

    Example:
        >>> table = NameTable([("layers.{n}.attention.wq.weight", "model.layers.{n}.self_attn.q_proj.weight")])
        >>> table.to_target("layers.3.attention.wq.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.pairs = tuple(pairs)
        for side in zip(*self.pairs, strict=True):
            if len(set(side)) != len(side):
                raise ValueError(f"A name table must be one-to-one, but a name repeats in {side}.")
        self._targets = dict(self.pairs)
        self._sources = {target: source for source, target in self.pairs}

    def to_target(self, name: str) -> str:
        """Translate a source name.

        Raises:
            ValueError: The table does not hold the name.
        """
        return _translate(self._targets, name)

    def to_source(self, name: str) -> str:
        """Translate a target name back.

        Raises:
            ValueError: The table does not hold the name.
        """
        return _translate(self._sources, name)


def _translate(table: Mapping[str, str], name: str) -> str:
    if name in table:
        return table[name]
    pattern, number = _pattern_of(name)
    if pattern not in table:
        raise ValueError(f"Unknown tensor name {name!r:.200}: dense Mistral text models have no such tensor.")
    return table[pattern].replace("{n}", number)


def _pattern_of(name: str) -> tuple[str, str]:
    """Split ``layers.3.ffn_norm.weight`` into ``layers.{n}.ffn_norm.weight`` and ``3``."""
    match = re.search(r"(?<=layers\.)[0-9]+(?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{n}}{name[match.end() :]}", match.group()


_LINEAR = (
    ("layers.{n}.attention.wq", "model.layers.{n}.self_attn.q_proj"),
    ("layers.{n}.attention.wk", "model.layers.{n}.self_attn.k_proj"),
    ("layers.{n}.attention.wv", "model.layers.{n}.self_attn.v_proj"),
    ("layers.{n}.attention.wo", "model.layers.{n}.self_attn.o_proj"),
    ("layers.{n}.feed_forward.w1", "model.layers.{n}.mlp.gate_proj"),
    ("layers.{n}.feed_forward.w2", "model.layers.{n}.mlp.down_proj"),
    ("layers.{n}.feed_forward.w3", "model.layers.{n}.mlp.up_proj"),
)

_OTHER = (
    ("tok_embeddings", "model.embed_tokens"),
    ("layers.{n}.attention_norm", "model.layers.{n}.input_layernorm"),
    ("layers.{n}.ffn_norm", "model.layers.{n}.post_attention_layernorm"),
    ("norm", "model.norm"),
    ("output", "lm_head"),
)

# Names of the raw format, and those of Hugging Face.
RAW_TO_HF = NameTable((f"{raw}.weight", f"{hf}.weight") for raw, hf in _LINEAR + _OTHER)

# Names of a raw LoRA file, and those of a PEFT adapter.
LORA_TO_PEFT = NameTable(
    (f"{raw}.lora_{side}.weight", f"base_model.model.{hf}.lora_{side}.weight") for raw, hf in _LINEAR for side in "AB"
)

# Tensors whose rows are permuted, with the field that holds their number of heads.
_ROTARY = {
    "layers.{n}.attention.wq.weight": "n_heads",
    "layers.{n}.attention.wk.weight": "n_kv_heads",
    "layers.{n}.attention.wq.lora_B.weight": "n_heads",
    "layers.{n}.attention.wk.lora_B.weight": "n_kv_heads",
}


# The first parts of the raw names of a vision tower's tensors, which lie beside those of the text model.
_VISION = {"vision_encoder", "vision_language_adapter", "patch_merger", "pre_mm_projector_norm"}


def vision_part(raw_name: str) -> str | None:
    """The part of a vision tower that a raw tensor belongs to; None for those of the text model."""
    part = raw_name.partition(".")[0]
    return part if part in _VISION else None


def is_rotary(raw_name: str) -> bool:
    """Whether translation changes the row order of this raw tensor; the other tensors keep their values."""
    return _pattern_of(raw_name)[0] in _ROTARY


def interleaved_to_half(weight: Array, heads: int) -> Array:
    """Reorder the rows of a query or key projection from interleaved to half-rotation RoPE.

    The raw format rotates the pairs of rows (0, 1), (2, 3), ...; Hugging Face rotates (0, D/2), (1, D/2 + 1), ...

    Args:
        weight: ``[H * D, inputs]``, or ``[H * D]``.
        heads: H, the query heads for q and the key/value heads for k.

    Returns:
        The same values in the new row order.

    Raises:
        ValueError: The rows do not split into that many heads of an even size.
    """
    return _swap_rows(weight, (heads, _half_dim(weight, heads), 2))


def half_to_interleaved(weight: Array, heads: int) -> Array:
    """Undo `interleaved_to_half`."""
    return _swap_rows(weight, (heads, 2, _half_dim(weight, heads)))


def _half_dim(weight: Array, heads: int) -> int:
    rows = int(weight.shape[0])
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows do not split into {heads} heads of an even size: check the head count.")
    return rows // (2 * heads)


def _swap_rows(weight: Array, split: Shape) -> Array:
    shape = tuple(weight.shape)
    return weight.reshape((*split, *shape[1:])).swapaxes(1, 2).reshape(shape)


def raw_to_hf(name: str, weight: Array, params: Params) -> tuple[str, Array]:
    """Translate one raw tensor, of a model or of a LoRA file, to its Hugging Face name and row order."""
    table = LORA_TO_PEFT if ".lora_" in name else RAW_TO_HF
    heads = _ROTARY.get(_pattern_of(name)[0])
    return table.to_target(name), weight if heads is None else interleaved_to_half(weight, params[heads])


def hf_to_raw(name: str, weight: Array, params: Params) -> tuple[str, Array]:
    """Undo `raw_to_hf`: translate one Hugging Face (or PEFT) tensor to its raw name and row order."""
    raw_name = (LORA_TO_PEFT if ".lora_" in name else RAW_TO_HF).to_source(name)
    heads = _ROTARY.get(_pattern_of(raw_name)[0])
    return raw_name, weight if heads is None else half_to_interleaved(weight, params[heads])


def raw_shapes(params: Params) -> dict[str, Shape]:
    """The name and shape of every tensor of a raw checkpoint with these normalized `params`, in file order."""
    dim, hidden, vocab = params["dim"], params["hidden_dim"], params["vocab_size"]
    q_rows, kv_rows = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    layer: dict[str, Shape] = {
        "attention_norm": (dim,),
        "attention.wq": (q_rows, dim),
        "attention.wk": (kv_rows, dim),
        "attention.wv": (kv_rows, dim),
        "attention.wo": (dim, q_rows),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (vocab, dim)}
    for n in range(params["n_layers"]):
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (dim,)
    if not params["tied_embeddings"]:
        shapes["output.weight"] = (vocab, dim)
    return shapes


def hf_shapes(params: Params) -> dict[str, Shape]:
    """The name and shape of every tensor of a Hugging Face checkpoint with these normalized `params`."""
    return {RAW_TO_HF.to_target(name): shape for name, shape in raw_shapes(params).items()}


def check_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Check that a checkpoint holds exactly the expected tensors in the expected shapes.

    Args:
        found: The shapes in the checkpoint, by name.
        expected: The shapes that its configuration implies.
        where: Names the checkpoint in an error, as the first words of a sentence.

    Raises:
        ValueError: A tensor is unknown, missing, or of another shape.
    """
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if unknown:
        raise ValueError(f"{where} holds {len(unknown)} unexpected tensors, {_some(unknown)}: {_refusal_of(unknown)}.")
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} tensors, {_some(missing)}: is a shard missing?")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(found[name])}, but the configuration needs {shape}: the two do not"
                " belong together."
            )


_FOREIGN_TENSORS = {
    "experts": "they belong to a mixture of experts, not a dense Mistral",
    "mixer": "they belong to a mamba model, not a transformer",
    "vision": "they belong to a vision tower, which params.json does not describe",
    "qscale": "they belong to a quantized checkpoint; convert the unquantized one",
    "lora_": "they belong to a LoRA adapter; convert it from its own folder",
}


def _refusal_of(names: Iterable[str]) -> str:
    joined = " ".join(names)
    return next((why for part, why in _FOREIGN_TENSORS.items() if part in joined), "a dense Mistral does not have them")


def _some(names: Collection[str]) -> str:
    shown = [f"{name:.200}" for name in list(names)[:4]]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def check_adapter(found: Mapping[str, Shape], params: Params, where: str) -> int:
    """Check a raw adapter's tensors against the model that `params` describe, and return its rank.

    Args:
        found: The shapes, by raw name: ``lora_A`` ``[rank, inputs]`` and ``lora_B`` ``[outputs, rank]`` for each
            projection.
        params: The normalized params of the base model.
        where: Names the adapter in an error.

    Raises:
        ValueError: There are no tensors, or a tensor is unknown, missing, or of another shape.
    """
    if not found:
        raise ValueError(f"{where} holds no tensors: copy the adapter again.")
    whole = raw_shapes(params)
    rank = min(next(iter(found.values())), default=0)
    if rank < 1:
        raise ValueError(f"{where}: the rank of {next(iter(found)):.200} is {rank}, but must be at least 1.")
    expected: dict[str, Shape] = {}
    for name in found:
        prefix = name.split(".lora_")[0]
        if f"{prefix}.weight" not in whole:
            raise ValueError(
                f"{where} holds {name:.200}, which adapts no tensor of a model with {params['n_layers']} layers."
            )
        outputs, inputs = whole[f"{prefix}.weight"]
        expected |= {f"{prefix}.lora_A.weight": (rank, inputs), f"{prefix}.lora_B.weight": (outputs, rank)}
    check_tensors(found, expected, where)
    return rank
