"""What the JAX models share: weights, loading and saving, devices, and the compiled forward pass.

Legend: B batch, S new tokens.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from transformers import GenerationConfig
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin

from ..checkpoints.pretrained import locate, open_weights, save_folder
from ..checkpoints.reader import Shape, TensorInfo
from ..checkpoints.writer import LazyTensor
from ..compatibility import check_model_type
from ..configuration_mistral import MistralConfig
from .cache import FlaxRollingCache
from .compiled import forward_programs
from .migration import check_old_options
from .params import Params, Stacker, check_params, flatten, from_state, nest, tensors_of, to_module
from .sharding import check_mesh, shard_rows, weight_sharding
from .validation import as_array, check_inputs
from .weights import PACKED, Int8Weight, leaves_of

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = ("float32", "bfloat16", "float16")
_WITHOUT_EFFECT = ("from_pt", "input_shape", "trust_remote_code")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "endpoint")


class FlaxMistralPreTrainedModel(PushToHubMixin):
    """What the models share: weights, loading and saving, devices, and the compiled forward pass.

    Args:
        config: The model's configuration.
        input_shape: Without effect, as no weight depends on it.
        seed: Seed of the random weights.
        dtype: Dtype of weights and activations: float32, bfloat16 or float16.
        _do_init: With False, the model has no weights: every call takes `params`, such as `init_weights` returns.
        scan_layers: Keep every weight of all layers in one array, and compile one layer instead of all: compiling is
            several times faster, decoding somewhat slower. Names in `params` then lack the layer's number.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        mesh: Devices to spread the weights over, with the axes ``data`` and ``model``.

    Attributes:
        config: The configuration.
        generation_config: Defaults of `generate`.
        dtype: As given.
        mesh: As given.

    Raises:
        ValueError: The configuration needs something that this port does not have, or the dtype is not one of those.
    """

    module_class: ClassVar[type[nnx.Module]]
    architecture: ClassVar[str]

    def __init__(
        self,
        config: MistralConfig,
        input_shape: Any = None,
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        scan_layers: bool = False,
        gradient_checkpointing: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self._set_up(config, dtype, scan_layers, gradient_checkpointing, mesh)
        if _do_init:
            self.params = from_state(nnx.state(self._build(seed)))

    def _set_up(self, config: MistralConfig, dtype: Any, scan: bool, remat: bool, mesh: Mesh | None) -> None:
        """Set everything but the weights."""
        config.validate_architecture()
        self.dtype = jnp.dtype(dtype)
        if self.dtype.name not in DTYPES:
            raise ValueError(f"dtype={self.dtype.name} is not supported: choose one of {', '.join(DTYPES)}.")
        if mesh is not None:
            check_mesh(mesh)
        self.config, self.mesh = config, mesh
        self.generation_config: GenerationConfig = GenerationConfig.from_model_config(config)
        self._scan, self._remat = scan, remat
        self._params: Params | None = None
        self._graph, state = nnx.split(nnx.eval_shape(partial(self._build, 0)))
        self._abstract = from_state(state)
        self._tensors = tensors_of(self._abstract, config.num_hidden_layers, scan)

    def _build(self, seed: Any) -> nnx.Module:
        options = {"scan_layers": self._scan, "remat": self._remat}
        return self.module_class(self.config, self.dtype, **options, rngs=nnx.Rngs(seed))

    def _shardings(self) -> dict[str, Any]:
        """The sharding of every weight by its name; None without a mesh."""
        mesh = self.mesh
        return {
            name: None if mesh is None else weight_sharding(name, leaf.shape, mesh)
            for name, leaf in flatten(self._abstract).items()
        }

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: Any = None,
        *,
        config: MistralConfig | None = None,
        seed: int = 0,
        scan_layers: bool = False,
        gradient_checkpointing: bool = False,
        mesh: Mesh | None = None,
        load_in_8bit: bool = False,
        _do_init: bool = True,
        **options: Any,
    ) -> Self:
        """Load a checkpoint one tensor at a time: memory peaks at little more than the size of the weights.

        Args:
            name_or_path: A folder, or a model id on the hub.
            dtype: Dtype of weights and activations (default: the checkpoint's).
            config: The configuration (default: the checkpoint's).
            seed: Seed of the weights that the checkpoint lacks.
            scan_layers, gradient_checkpointing, mesh: See the class; every weight is put straight onto its devices.
            load_in_8bit: Quantize every matrix as it is read; see `quantize`.
            _do_init: With False, return a model without weights, and the weights.
            **options: Options of the hub (``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download``, ``endpoint``), and fields of the configuration to override. ``from_pt``,
                ``input_shape`` and ``trust_remote_code`` have no effect: there is one format, and no code in it.

        Returns:
            The model; with ``_do_init=False``, the model and its weights. Weights of its head that the checkpoint lacks
            are random, and a warning names them.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            CheckpointError: Weights of the decoder are missing, unknown, or have another shape.
            ValueError: An option is unknown, or the configuration needs something that this port does not have.
        """
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        check_old_options("from_pretrained", options)
        fields = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
        folder = locate(name_or_path, **hub)
        check_model_type(folder, MistralConfig.get_config_dict(folder)[0].get("model_type"))
        if config is None:
            config, fields = MistralConfig.from_pretrained(folder, return_unused_kwargs=True, **fields)
        if fields:
            raise ValueError(
                f"from_pretrained has no option {min(fields)!r}, and MistralConfig has no such field (nor may it be"
                " given beside a config). Besides these fields it takes dtype, config, seed, scan_layers,"
                f" gradient_checkpointing, mesh, load_in_8bit, {', '.join(_HUB_OPTIONS)}."
            )
        if dtype is None:
            dtype = str(config.dtype or "float32").removeprefix("torch.")
        model = cls.__new__(cls)
        model._set_up(config, dtype, scan_layers, gradient_checkpointing, mesh)
        model._load(folder, seed, load_in_8bit)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if _do_init:
            return model
        params, model._params = model.params, None
        return cast(Any, (model, params))

    def _load(self, folder: Path, seed: int, load_in_8bit: bool) -> None:
        packed = self._quantized if load_in_8bit else None
        stacker = Stacker(self.config.num_hidden_layers, self.dtype, self._shardings(), packed)
        with open_weights(folder, {stored: shape for stored, (_, _, shape) in self._tensors.items()}) as weights:
            progress = logging.tqdm(weights.stream(), total=len(weights), desc="Loading weights", leave=False)
            for stored, array in progress:
                stacker.put(*self._tensors[stored][:2], array)
                del array  # not held while the next one is read
            for stored in weights.missing:
                stacker.put(*self._tensors[stored][:2], self._random_weight(self._tensors[stored][2], seed))
        self.params = nest(stacker.arrays)

    def _random_weight(self, shape: Shape, seed: int) -> Any:
        return jax.random.normal(jax.random.key(seed), shape, self.dtype) * self.config.initializer_range

    def init_weights(self, rng: Any, input_shape: Any = None, params: Params | None = None) -> Params:
        """Random weights.

        Args:
            rng: A random key or a seed.
            input_shape: Without effect, as no weight depends on it.
            params: Weights to keep; only those that are missing are random.
        """
        return nest(flatten(from_state(nnx.state(self._build(rng)))) | flatten(params or {}))

    def quantize(self) -> None:
        """Replace every matrix by the nearest in int8 with a factor for each output, for decoding.

        On a CPU, a step of few sequences takes about 0.6 times as long as in float32, a prompt somewhat longer; memory
        is about a quarter. Activations keep their dtype. Such weights are neither trained nor saved.

        Raises:
            ValueError: The model is spread over several devices.
        """
        weights = flatten(self.params).items()
        self.params = nest({name: w if name.endswith("norm.weight") else self._quantized(w) for name, w in weights})

    def _quantized(self, weight: Any) -> Any:
        if self.mesh is not None:
            raise ValueError("int8 weights cannot be spread over a mesh: quantize a model on one device.")
        return weight if isinstance(weight, PACKED) or weight.ndim == 1 else Int8Weight.of(weight)

    def save_pretrained(
        self,
        folder: str | Path,
        params: Params | None = None,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> None:
        """Write a checkpoint that PyTorch, TensorFlow and this class load.

        Args:
            folder: The target; a checkpoint in it is replaced.
            params: Weights in place of the model's own.
            max_shard_size: Largest size of a file, in bytes or such as ``"5GB"``.
            **options: None that has an effect: ``safe_serialization=True`` is how it is done.

        Raises:
            FileExistsError: The folder holds something other than a checkpoint.
            ValueError: A weight is quantized or has an adapter; or an option is unknown.
        """
        check_old_options("save_pretrained", options)
        flat = flatten(self.params if params is None else params)
        if packed := [name for name, weight in flat.items() if isinstance(weight, PACKED)]:
            raise ValueError(
                f"{packed[0]} is in int8 or has an adapter: save the model before it is quantized, an adapter with its"
                " own save_pretrained, or both together as params=adapter.merged(params)."
            )

        def read(name: str, layer: int | None) -> Any:
            return np.asarray(flat[name] if layer is None else flat[name][layer])

        tensors = [
            LazyTensor(stored, TensorInfo(flat[name].dtype.name, shape), partial(read, name, layer))
            for stored, (name, layer, shape) in sorted(self._tensors.items())
        ]
        save_folder(
            folder,
            self.config,
            self.generation_config,
            tensors,
            architecture=self.architecture,
            dtype=next(iter(flat.values())).dtype.name,
            max_shard_size=max_shard_size,
        )

    @property
    def module(self) -> Any:
        """The model as a Flax NNX module with these weights; changes to the module do not change the model.

        To take over trained weights, set ``model.params = nnx.to_pure_dict(nnx.state(module))``.
        """
        return to_module(self._graph, self.params)

    @property
    def params(self) -> Params:
        """The weights, a plain nested dict by Hugging Face names. Setting them puts them on their devices.

        Raises:
            ValueError: A weight is missing, unknown, or has another shape.
        """
        if self._params is None:
            raise ValueError(
                "This model was created with _do_init=False and has no weights: pass params= to every call, or set"
                " model.params = model.init_weights(seed)."
            )
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        check_params(params, self._abstract)
        shardings, flat = self._shardings(), flatten(params)
        placed = {
            name: jax.device_put(weight, None if isinstance(weight, PACKED) else shardings[name])
            for name, weight in flat.items()
        }
        self._params = nest(placed)

    @property
    def params_shape_tree(self) -> Params:
        """Shapes and dtypes of the weights, without values."""
        return self._abstract

    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """The weights in bfloat16, or those that a tree of booleans marks; `params` stay as they are."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """The weights in float16; see `to_bf16`."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """The weights in float32; see `to_bf16`."""
        return _cast(params, jnp.float32, mask)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them, from now on."""
        params = self._params
        self._set_up(self.config, self.dtype, self._scan, True, self.mesh)
        self._params = params

    def __repr__(self) -> str:
        config, (heads, kv_heads, head_dim) = self.config, self.config.head_shape
        weights = leaves_of(self._abstract if self._params is None else self._params)
        count = sum(math.prod(weight.shape) for weight in weights)
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
        kinds = ", ".join(sorted({type(weight).__name__ for weight in weights if isinstance(weight, PACKED)}))
        return (
            f"{type(self).__name__}(\n"
            f"  {count:,} parameters in {self.dtype.name}{f' and {kinds}' if kinds else ''}, {nbytes / 1e6:,.1f} MB"
            f"{'' if self._params is not None else ', not initialised'}\n"
            f"  {config.num_hidden_layers} layers of {config.hidden_size}, {heads} heads of {head_dim} ({kv_heads} for"
            f" keys and values), feed-forward {config.intermediate_size} ({config.hidden_act})\n"
            f"  vocabulary {config.vocab_size}, window {config.shared_window}, rotary"
            f" {(config.rope_parameters or {}).get('rope_type')}, scan_layers={self._scan},"
            f" gradient_checkpointing={self._remat}\n)"
        )

    def init_cache(self, batch_size: int, max_length: int) -> FlaxRollingCache:
        """An empty cache, to pass as `past_key_values`; every call returns the cache for the next one.

        Args:
            batch_size: Number of rows.
            max_length: Number of tokens in a row, padding included. If it is at least the window, the cache serves any
                length.
        """
        module = self.module
        return getattr(module, "model", module).init_cache(batch_size, max_length)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        params: Params | None = None,
        past_key_values: FlaxRollingCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
        dropout_rng: Array | None = None,
        **options: Any,
    ) -> Self:
        """Run the model; differentiable, and compiled once for every shape of the inputs.

        Args:
            input_ids: ``[B, S]`` token ids: a JAX or NumPy array, or lists.
            attention_mask: ``[B, S]``, nonzero for real tokens. With a cache it may begin with columns for the cached
                tokens; they are not used, as the cache records which of its tokens are real.
            position_ids: ``[B or 1, S]``; by default the first real token of a row has position 0. Positions that
                restart (without mask and cache) mark packed sequences, which do not see each other.
            params: Weights in place of the model's own.
            past_key_values: The cached tokens; see `init_cache`.
            output_hidden_states, output_attentions: Return these too (default: the configuration's fields).
            return_dict: With False, return a tuple (default: the configuration's field).
            train: Apply dropout.
            dropout_rng: Random key of the dropout.
            **options: ``logits_to_keep`` of `FlaxMistralForCausalLM`: compute logits for that many last positions only;
                0 means all.

        Returns:
            A `FlaxModelOutput`, `FlaxCausalLMOutput` or `FlaxSequenceClassifierOutput`.

        Raises:
            ValueError: Shapes do not fit, an id lies outside the vocabulary, positions restart although a mask lets
                packed sequences see each other, a cache is full, or dropout lacks its key.
        """
        inputs = self._inputs(input_ids, attention_mask, position_ids, past_key_values)
        if train and self.config.attention_dropout and dropout_rng is None:
            raise ValueError(
                f"attention_dropout={self.config.attention_dropout} needs a random key: pass"
                " dropout_rng=jax.random.key(...)."
            )
        check_old_options("a call", options)
        outputs = forward_programs(self._graph).forward(
            self.params if params is None else params,
            *inputs,
            past_key_values,
            dropout_key=dropout_rng if train else None,
            output_hidden_states=_or_default(output_hidden_states, self.config.output_hidden_states),
            output_attentions=_or_default(output_attentions, self.config.output_attentions),
            **options,
        )
        return outputs if _or_default(return_dict, self.config.return_dict) else outputs.to_tuple()

    def _inputs(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: FlaxRollingCache | None = None
    ) -> list[Any]:
        """Ids, mask and positions: checked, and on their devices."""
        ids, mask = as_array("input_ids", input_ids), as_array("attention_mask", attention_mask)
        positions = as_array("position_ids", position_ids)
        check_inputs(ids, mask, positions, cache, self.config)
        return [None if x is None else shard_rows(x, self.mesh) for x in (ids, mask, positions)]


def _cast(params: Params, dtype: Any, mask: Any) -> Params:
    chosen = jax.tree.map(lambda _: True, params) if mask is None else mask
    return jax.tree.map(lambda weight, cast: weight.astype(dtype) if cast else weight, params, chosen)


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value
