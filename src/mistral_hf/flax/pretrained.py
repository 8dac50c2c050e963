"""What the JAX models share: weights, loading and saving, devices, and the compiled forward pass.

Legend: B batch, S new tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from transformers import GenerationConfig
from transformers.utils.hub import PushToHubMixin

from ..checkpoints.pretrained import locate, open_weights, save_folder
from ..checkpoints.reader import Shape, TensorInfo
from ..checkpoints.writer import LazyTensor
from ..configuration_mistral import MistralConfig
from .cache import FlaxRollingCache
from .compiled import forward_programs
from .params import Params, Stacker, check_params, flatten, from_state, nest, tensors_of, to_module
from .sharding import check_mesh, shard_rows, weight_sharding
from .validation import as_array, check_inputs

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = ("float32", "bfloat16", "float16")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "endpoint")


class FlaxMistralPreTrainedModel(PushToHubMixin):
    """What both models share: weights, loading and saving, devices, and the compiled forward pass.

    Args:
        config: The model's configuration.
        seed: Seed of the random weights.
        dtype: Dtype of weights and activations: float32, bfloat16 or float16.
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
        seed: int = 0,
        dtype: Any = jnp.float32,
        *,
        scan_layers: bool = False,
        gradient_checkpointing: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self._set_up(config, dtype, scan_layers, gradient_checkpointing, mesh)
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
        self._graph, state = nnx.split(nnx.eval_shape(partial(self._build, 0)))
        self._abstract = from_state(state)
        self._tensors = tensors_of(self._abstract, config.num_hidden_layers, scan)

    def _build(self, seed: int) -> nnx.Module:
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
        scan_layers: bool = False,
        gradient_checkpointing: bool = False,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint one tensor at a time: memory peaks at little more than the size of the weights.

        Args:
            name_or_path: A folder, or a model id on the hub.
            dtype: Dtype of weights and activations (default: the checkpoint's).
            scan_layers, gradient_checkpointing, mesh: See the class; every weight is put straight onto its devices.
            **options: Options of the hub (``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download``, ``endpoint``), and fields of the configuration to override.

        Returns:
            The model. Weights of its head that the checkpoint lacks are random, and a warning names them.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            CheckpointError: Weights of the decoder are missing, unknown, or have another shape.
            ValueError: An option is unknown, or the configuration needs something that this port does not have.
        """
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        folder = locate(name_or_path, **hub)
        config, unknown = MistralConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
        if unknown:
            raise ValueError(
                f"from_pretrained has no option {min(unknown)!r}, and MistralConfig has no such field. Besides these"
                f" fields it takes dtype, scan_layers, gradient_checkpointing, mesh, {', '.join(_HUB_OPTIONS)}."
            )
        if dtype is None:
            dtype = str(config.dtype or "float32").removeprefix("torch.")
        model = cls.__new__(cls)
        model._set_up(config, dtype, scan_layers, gradient_checkpointing, mesh)
        model._load(folder)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def _load(self, folder: Path) -> None:
        stacker = Stacker(self.config.num_hidden_layers, self.dtype, self._shardings())
        with open_weights(folder, {stored: shape for stored, (_, _, shape) in self._tensors.items()}) as weights:
            for stored, array in weights.stream():
                stacker.put(*self._tensors[stored][:2], array)
                del array  # not held while the next one is read
            for stored in weights.missing:
                stacker.put(*self._tensors[stored][:2], self._random_weight(self._tensors[stored][2]))
        self.params = nest(stacker.arrays)

    def _random_weight(self, shape: Shape) -> Any:
        return jax.random.normal(jax.random.key(0), shape, self.dtype) * self.config.initializer_range

    def save_pretrained(
        self, folder: str | Path, params: Params | None = None, max_shard_size: int | str = "50GB"
    ) -> None:
        """Write a checkpoint that PyTorch, TensorFlow and this class load.

        Args:
            folder: The target; a checkpoint in it is replaced.
            params: Weights in place of the model's own.
            max_shard_size: Largest size of a file, in bytes or such as ``"5GB"``.

        Raises:
            FileExistsError: The folder holds something other than a checkpoint.
        """
        flat = flatten(self.params if params is None else params)

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
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        check_params(params, self._abstract)
        shardings, flat = self._shardings(), flatten(params)
        self._params = nest({name: jax.device_put(weight, shardings[name]) for name, weight in flat.items()})

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
            train: Apply dropout.
            dropout_rng: Random key of the dropout.
            **options: ``logits_to_keep`` of `FlaxMistralForCausalLM`: compute logits for that many last positions only;
                0 means all.

        Returns:
            A `FlaxModelOutput` or `FlaxCausalLMOutput`.

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
        return forward_programs(self._graph).forward(
            self.params if params is None else params,
            *inputs,
            past_key_values,
            dropout_key=dropout_rng if train else None,
            output_hidden_states=_or_default(output_hidden_states, self.config.output_hidden_states),
            output_attentions=_or_default(output_attentions, self.config.output_attentions),
            **options,
        )

    def _inputs(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: FlaxRollingCache | None = None
    ) -> list[Any]:
        """Ids, mask and positions: checked, and on their devices."""
        ids, mask = as_array("input_ids", input_ids), as_array("attention_mask", attention_mask)
        positions = as_array("position_ids", position_ids)
        check_inputs(ids, mask, positions, cache, self.config)
        return [None if x is None else shard_rows(x, self.mesh) for x in (ids, mask, positions)]


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value
