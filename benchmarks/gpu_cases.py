"""The named cases for a GPU: decoding on a filled cache, and prompts, with a model of the shape of Mistral-7B.

Legend: B batch, K key/value heads, S tokens, D head_dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .harness import SUBJECT, Run
from .models import IMPLEMENTATIONS, MISTRAL_7B, TINY, Shape
from .workloads import ModelCase, Prefill, Steps

CHUNK = 4096  # tokens


def make_models(shape: Shape, window: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Both versions with the same random weights, which are in memory once."""
    models: dict[str, Any] = {}
    for version, (config_class, model_class) in IMPLEMENTATIONS.items():
        config = shape.config(
            config_class, sliding_window=window, tie_word_embeddings=False, dtype=dtype, attn_implementation="sdpa"
        )
        with torch.device("meta") if models else device:
            model = model_class._from_config(config, dtype=dtype)
        if models:
            model.load_state_dict(models[SUBJECT].state_dict(), assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are not saved
        else:
            generator = torch.Generator(device).manual_seed(0)
            for parameter in (weight for weight in model.parameters() if weight.ndim > 1):
                parameter.data.normal_(std=0.02, generator=generator)
        models[version] = model.eval().requires_grad_(False)
    return models


@dataclass(frozen=True, kw_only=True)
class GpuCase(ModelCase):
    """A case whose models are made once for all cases, by `make_models`.

    Attributes:
        attention: Attention implementation of both versions.
    """

    attention: str = "sdpa"
    dtype: str = "bfloat16"
    shape: Shape = MISTRAL_7B

    def tiny(self) -> "GpuCase":
        """The same case in the smallest sizes."""
        return replace(
            self,
            length=max(16, self.length // 512),
            window=(self.window or 0) // 512,
            batch=min(self.batch, 4),
            tokens=min(self.tokens, 2),
            shape=TINY,
            repeats=2,
        )


@dataclass(frozen=True, kw_only=True)
class GpuDecoding(GpuCase, Steps):
    """Steps on a filled cache.

    Attributes:
        compiled: Run the step as one CUDA graph on preallocated caches, instead of eagerly on the default ones.
    """

    compiled: bool = False

    def prepare(self, model: Any, version: str) -> Run:
        """A run takes `tokens` further steps; it returns the last logits ``[B, V]``."""
        warm_ups = 2 if self.compiled else 1  # the second run records the CUDA graph
        capacity = self.length + self.tokens * (self.repeats + warm_ups + 1)
        cache = self.filled_cache(model, version, capacity if self.compiled else None)
        steps = self.steps(self._compiled(model) if self.compiled else model.forward, cache)

        @torch.inference_mode(not self.compiled)
        def run() -> Tensor:
            return steps().clone()  # the next run overwrites a CUDA graph's outputs

        for _ in range(warm_ups):
            run()
        return run

    def store(self, cache: Cache, states: Tensor, layer: int) -> None:
        """Add keys and values ``[2, B, K, S, D]`` in two calls, after which no cache keeps all of `states` alive."""
        cache.update(*states[:, :, :, :-1], layer)
        cache.update(*states[:, :, :, -1:], layer)

    def _compiled(self, model: Any) -> Callable[..., Any]:
        """The forward pass as a CUDA graph; without a GPU it is only traced, which shows that it runs."""
        on_gpu = torch.get_default_device().type == "cuda"
        options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
        compiled = torch.compile(model.forward, **options)

        def forward(*inputs: Any, **options: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*inputs, **options)

        return forward


@dataclass(frozen=True, kw_only=True)
class GpuPrefill(GpuCase, Prefill):
    """A prompt from an empty cache to the first token.

    Attributes:
        chunk: Tokens of a chunk of the prompt, or None for the whole prompt in one pass.
    """

    chunk: int | None = None
    peak_memory: bool = True

    def tiny(self) -> "GpuPrefill":
        """The same case in the smallest sizes."""
        return replace(cast("GpuPrefill", super().tiny()), chunk=self.chunk and 16)

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the last logits ``[B, V]``."""
        prompt = self.ids(self.length)

        @torch.inference_mode()
        def run() -> Tensor:
            if self.chunk is None:
                return model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1]
            options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": self.chunk}
            wanted = {"return_dict_in_generate": True, "output_logits": True}
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **wanted).logits[0]

        run()
        return run


DECODING = tuple(
    GpuDecoding(
        name=f"decode_b{batch}_{length // 1024}k{'_compiled' if compiled else ''}",
        title=f"decode, batch {batch}, context {length}, {'compiled' if compiled else 'eager'}",
        group="decode_compiled" if compiled else "decode_eager",
        length=length,
        batch=batch,
        tokens=16,
        repeats=7,
        compiled=compiled,
    )
    for compiled in (False, True)
    for batch in (1, 8, 32)
    for length in (1024, 8192, 32768)
)
PREFILL = tuple(
    GpuPrefill(
        name=f"prefill_{length // 1024}k_{label}",
        title=f"prompt of {length} tokens, {attention}",
        group=f"prefill_{label}",
        length=length,
        attention=attention,
        repeats=5,
    )
    for label, attention in (("sdpa", "sdpa"), ("flash", "flash_attention_2"))
    for length in (4096, 16384, 32768, 65536)
)
CHUNKED = tuple(
    replace(
        case,
        name=f"{case.name}_chunked",
        title=f"{case.title}, in chunks of {CHUNK}",
        group="prefill_chunked",
        chunk=CHUNK,
    )
    for case in PREFILL
    if case.length == 65536
)
CASES: tuple[GpuCase, ...] = (*DECODING, *PREFILL, *CHUNKED)
