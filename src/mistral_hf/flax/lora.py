"""LoRA adapters in PEFT's format: loaded, applied, trained, merged and saved without PEFT.

    adapter = FlaxLoraAdapter.create(model, r=8, target_modules=("q_proj", "v_proj"))

    @jax.jit
    def step(lora, state, base, batch):  # with an optimizer of optax; only the adapter's matrices change
        loss, gradient = jax.value_and_grad(lambda lora: model.loss(batch, params=adapter.applied(base, lora)))(lora)
        updates, state = optimizer.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, loss

Legend: R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints.pretrained import keep_other_files, locate
from ..checkpoints.reader import TensorInfo, open_checkpoint
from ..checkpoints.writer import LazyTensor, atomic_folder, write_checkpoint
from ..compatibility import CheckpointError
from .params import Params, flatten, nest
from .weights import AdaptedWeight

_PREFIX = "base_model.model."  # of PEFT's names
_CONFIG, _STEM = "adapter_config.json", "adapter_model"
# What a plain LoRA does not have, with the values that mean its absence.
_PLAIN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"), (None, {}, [])),
    "trainable_token_indices": (None, {}, []),
    "bias": ("none", None),
}


def _check_adapter_folder(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise FileExistsError(
            f"{folder} is not the folder of an adapter (it holds no {_CONFIG}), so it is not replaced: remove it"
            " yourself, or save to another folder."
        )


class FlaxLoraAdapter:
    """The matrices of an adapter and PEFT's settings for it.

    Attributes:
        config: The content of ``adapter_config.json``. Its ``lora_dropout`` is not applied.
        params: The matrices, a nested dict by PEFT's names: what is trained.
    """

    def __init__(self, config: Mapping[str, Any], params: Params) -> None:
        for name, plain in {"peft_type": ("LORA",), **_PLAIN}.items():
            if config.get(name, plain[0]) not in plain:
                raise ValueError(
                    f"{_CONFIG} has {name}={config[name]!r}, but the JAX port loads a plain LoRA, with {plain[0]!r}:"
                    " merge the adapter into the model with PEFT (merge_and_unload), and load the result."
                )
        self.config, self.params = dict(config), params

    @property
    def scaling(self) -> float:
        """The strength of the addition: ``alpha / R``, or ``alpha / sqrt(R)`` (rank-stabilised)."""
        rank = self.config["r"]
        return float(self.config["lora_alpha"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @classmethod
    def create(
        cls,
        model: Any,
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: Sequence[str] = ("q_proj", "v_proj"),
        *,
        seed: int = 0,
        use_rslora: bool = False,
    ) -> FlaxLoraAdapter:
        """A new adapter, which changes nothing until it is trained: ``lora_B`` is zero, as in PEFT.

        Args:
            model: The model; its layers are not scanned.
            r: The rank.
            lora_alpha: Its strength.
            target_modules: Ends of the names of the linear maps to adapt.
            seed: Of ``lora_A``.
            use_rslora: Divide `lora_alpha` by the square root of the rank (Kalajdzievski, 2023).

        Raises:
            ValueError: The model has no such map.
        """
        shapes = {name.removesuffix(".weight"): leaf.shape for name, leaf in flatten(model.params_shape_tree).items()}
        found = {name: shape for name, shape in shapes.items() if name.split(".")[-1] in target_modules}
        if missing := [name for name in target_modules if not any(found_.endswith(f".{name}") for found_ in found)]:
            raise ValueError(f"target_modules has {missing[0]!r}, but the model has no linear map of that name.")
        if scanned := [name for name, shape in found.items() if len(shape) != 2]:
            raise ValueError(f"{scanned[0]} holds all layers: create the adapter for a model with scan_layers=False.")
        flat, keys = {}, jax.random.split(jax.random.key(seed), len(found))
        for key, (name, (outputs, inputs)) in zip(keys, found.items(), strict=True):
            bound = 1 / math.sqrt(inputs)  # as in PEFT
            flat[f"{name}.lora_A.weight"] = jax.random.uniform(key, (r, inputs), minval=-bound, maxval=bound)
            flat[f"{name}.lora_B.weight"] = jnp.zeros((outputs, r))
        task = {"MistralForCausalLM": "CAUSAL_LM", "MistralForSequenceClassification": "SEQ_CLS"}
        config = {
            "peft_type": "LORA",
            "task_type": task.get(model.architecture, "FEATURE_EXTRACTION"),
            "base_model_name_or_path": None,
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": 0.0,
            "target_modules": list(target_modules),
            "use_rslora": use_rslora,
            "bias": "none",
            "inference_mode": True,
        }
        return cls(config, nest(flat))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_options: Any) -> FlaxLoraAdapter:
        """Load an adapter that PEFT, `save_pretrained` or a conversion wrote.

        Args:
            name_or_path: A folder, or an id on the hub.
            **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            FileNotFoundError: There is no such adapter.
            CheckpointError: A file is damaged.
            ValueError: The adapter is not a plain LoRA.
        """
        folder = locate(name_or_path, **hub_options)
        try:
            config = json.loads((folder / _CONFIG).read_text("utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} has no {_CONFIG}: it is not the folder of an adapter.") from error
        except ValueError as error:
            raise CheckpointError(f"{folder / _CONFIG} is not JSON ({error}): copy it again.") from error
        with open_checkpoint(folder, _STEM) as checkpoint:
            flat = {name.removeprefix(_PREFIX): jnp.asarray(checkpoint.read(name)) for name in checkpoint}
        return cls(config, nest(flat))

    def save_pretrained(self, folder: str | Path, params: Params | None = None) -> None:
        """Write the adapter for PEFT, vLLM and this class.

        Args:
            folder: The target; an adapter in it is replaced, and its other files stay.
            params: Matrices in place of the adapter's own, such as trained ones.

        Raises:
            FileExistsError: The folder holds something other than an adapter.
        """
        flat = flatten(self.params if params is None else params)
        tensors = [
            LazyTensor(_PREFIX + name, TensorInfo(matrix.dtype.name, tuple(matrix.shape)), partial(np.asarray, matrix))
            for name, matrix in sorted(flat.items())
        ]
        needs = sum(tensor.info.nbytes for tensor in tensors)
        with atomic_folder(folder, check_replaceable=_check_adapter_folder, needs_bytes=needs) as work:
            write_checkpoint(work, tensors, stem=_STEM)
            (work / _CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", "utf-8")
            keep_other_files(Path(folder), work)

    def applied(self, base: Params, params: Params | None = None) -> Params:
        """The weights of a model with the adapter beside them: for `params` of every call of the model.

        Args:
            base: The model's weights, which may be in int8 or stacked over the layers.
            params: Matrices in place of the adapter's own; differentiable with respect to them.

        Raises:
            ValueError: The adapter does not fit the model.
        """
        flat, scaling = flatten(base), self.scaling
        for name, (down, up) in self._matrices(params, set(flat)).items():
            shape = flat[name].shape
            if shape[-1] != down.shape[-1] or shape[-2] != up.shape[-2]:
                raise ValueError(
                    f"The adapter maps {down.shape[-1]} to {up.shape[-2]} features beside {name}, which is {shape}: it"
                    " belongs to another model."
                )
            flat[name] = AdaptedWeight(flat[name], down, up, scaling)
        return nest(flat)

    def merged(self, base: Params, params: Params | None = None) -> Params:
        """The weights of a model with the adapter added to them, each one array; arguments are those of `applied`."""
        flat = flatten(self.applied(base, params))
        return nest({name: w.dense() if isinstance(w, AdaptedWeight) else w for name, w in flat.items()})

    def _matrices(self, params: Params | None, weights: set[str]) -> dict[str, tuple[Any, Any]]:
        """``lora_A`` and ``lora_B`` by the names of the weights beside which they stand."""
        flat, pairs = flatten(self.params if params is None else params), {}
        for name in flat:
            if not re.fullmatch(r".+\.lora_[AB]\.weight", name):
                raise ValueError(f"The adapter has a tensor {name}, but a plain LoRA has only lora_A and lora_B.")
            module = name.rsplit(".", 2)[0]
            pairs[f"{module}.weight"] = flat[f"{module}.lora_A.weight"], flat[f"{module}.lora_B.weight"]
        stacks: dict[str, dict[int, tuple[Any, Any]]] = {}
        for name in list(pairs):
            number = re.search(r"layers\.(\d+)\.", name)
            stacked = name.replace(number[0], "layers.", 1) if number is not None else name
            if number is not None and stacked in weights:
                stacks.setdefault(stacked, {})[int(number[1])] = pairs.pop(name)
        for name, layers in stacks.items():
            down, up = zip(*(layers[index] for index in sorted(layers)), strict=True)
            pairs[name] = jnp.stack(down), jnp.stack(up)
        if unknown := sorted(pairs.keys() - weights):
            raise ValueError(f"The adapter changes {unknown[0]}, which the model does not have.")
        return pairs
