"""How `generate` gets its cache and its masks.

Legend: B batch, S new tokens, T keys.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin

from .cache import CACHE_NAME, FORMER_NAME, RollingCache, takes_cache
from .sequence_layout import SequenceLayout

ROLLING = (None, "dynamic", "offloaded", "static", "offloaded_static")  # cache implementations that are ours


class MistralGenerationMixin(GenerationMixin):
    """The library's `generate`, with a `RollingCache` in place of the library's dynamic and static caches."""

    config: Any
    model: Any

    @wraps(GenerationMixin.generate)
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A tokenizer's mapping in place of the ids, as chat templates return it.
        if isinstance(inputs, Mapping):
            inputs, kwargs = None, {**inputs, **kwargs}
        for name in {"cache", FORMER_NAME} & kwargs.keys() - {CACHE_NAME}:
            kwargs[CACHE_NAME] = kwargs.pop(name)
        return super().generate(inputs, *args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the library's, with the cache by its former name too, by which adapters of prompts look for it."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get(CACHE_NAME) is not None:
            inputs[FORMER_NAME] = inputs[CACHE_NAME]
        elif inputs.get("position_ids") is not None:  # those of right-padded rows restart, but are not packed
            inputs["packed"] = False
        return inputs

    @takes_cache
    def create_masks_for_generate(
        self,
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask of a compiled decoding step, made outside its graph; forward makes that of a prompt."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        layout = SequenceLayout.of(inputs_embeds, attention_mask, position_ids, cache)
        return self.model.make_mask(inputs_embeds, layout)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give `generate` a `RollingCache`, unless the caller passes or requests another cache, or none."""
        kind = generation_config.cache_implementation
        wants_none = generation_config.use_cache is False
        if kind not in ROLLING or wants_none or model_kwargs.get(CACHE_NAME) is not None:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.all():  # checked once here, so that no step has to
            del model_kwargs["attention_mask"]
        capacity = self._capacity(generation_config, max_cache_length)
        offloading = kind is not None and "offloaded" in kind
        round_up = not generation_config.output_attentions  # whose length should be that of the tokens
        cache = RollingCache(self.config, max_cache_len=capacity, offloading=offloading, round_up=round_up)
        if capacity is not None and generation_config.prefill_chunk_size is not None:
            beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            self._allocate(cache, batch_size * beams)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache
        return None

    def _capacity(self, generation_config: Any, max_cache_length: int) -> int | None:
        """Tokens that a static cache must hold: at least as many as in earlier calls, so their graph is reused."""
        if "static" not in (generation_config.cache_implementation or ""):
            return None
        requested = getattr(generation_config, "max_cache_len", None) or 0
        earlier = getattr(self, "_previous_max_cache_length", 1)
        self._previous_max_cache_length = max(max_cache_length, requested, earlier)
        return self._previous_max_cache_length

    def _allocate(self, cache: RollingCache, batch_size: int) -> None:
        """Allocate a static cache before a compiled prefill, whose graph cannot do it."""
        head_dim = self.config.head_shape[2]
        projection: Any = self.model.get_submodule("layers.0.self_attn.k_proj")
        split = hasattr(projection.weight, "to_local")  # tensor parallelism: only this rank's heads
        features = projection.weight.to_local().shape[0] if split else projection.out_features
        cache.early_initialization(batch_size, features // head_dim, head_dim, self.dtype, self.device)
