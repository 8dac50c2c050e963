"""The kinds of work that cases are made of. Legend: B batch, V vocabulary, W window."""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig
from transformers.models.mistral.configuration_mistral import MistralConfig as ReferenceConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as ReferenceModel
from transformers.utils.logging import disable_progress_bar

import mistral_hf

from .harness import REFERENCE, SUBJECT, Case, Cost, Run

WARM_UP = 64  # tokens


class Implementation(NamedTuple):
    """The classes of one version."""

    config_class: Any
    model_class: Any


IMPLEMENTATIONS = {
    SUBJECT: Implementation(mistral_hf.MistralConfig, mistral_hf.MistralForCausalLM),
    REFERENCE: Implementation(ReferenceConfig, ReferenceModel),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by default one of 135M parameters."""

    layers: int = 30
    hidden_size: int = 576
    intermediate_size: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab_size: int = 49152

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer, which are the embeddings too."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of all matrices."""
        return self.layers * self.layer_parameters + self.head_parameters


TINY = Shape(layers=2, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, head_dim=16, vocab_size=256)


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """What the cases that run a model have in common.

    Attributes:
        length: Prompt tokens, or tokens in the cache, of every sequence.
        window: W, or None for full attention.
        tokens: New tokens of a sample.
    """

    length: int
    window: int | None = 4096
    batch: int = 1
    tokens: int = 1
    dtype: str = "float32"
    shape: Shape = Shape()

    def tiny(self) -> "ModelCase":
        """The same case in the smallest sizes."""
        window = self.window and max(8, self.window // 64)
        length = max(8, self.length // 64)
        return replace(self, length=length, window=window, tokens=min(self.tokens, 2), shape=TINY, repeats=2)

    def with_layers(self, layers: int) -> "ModelCase":
        """The same case with a model of that many layers."""
        return replace(self, shape=replace(self.shape, layers=layers))

    def load(self, version: str, attention: str) -> Any:
        """The model, its weights the same whichever version it is."""
        implementation, shape = IMPLEMENTATIONS[version], self.shape
        config = implementation.config_class(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            sliding_window=self.window,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,
        )
        model = implementation.model_class(config).eval()
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.02, generator=generator)
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model

    def ids(self, length: int) -> Tensor:
        """Random tokens ``[B, length]``, always the same."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.shape.vocab_size, (self.batch, length), generator=generator)

    def _cost(self, items: int, tokens: int, kept: int, pairs: int, keys: int, times: int = 1) -> Cost:
        """Cost of a forward pass, `times` over.

        Args:
            items: Tokens by which the work is counted.
            tokens: New tokens of all sequences.
            kept: Those of them that get logits.
            pairs: Pairs of a query and a key that it sees.
            keys: Cached keys to read, of all sequences.
            times: How often that work is done.
        """
        shape = self.shape
        size = getattr(torch, self.dtype).itemsize
        matrices = 2 * (tokens * shape.layers * shape.layer_parameters + kept * shape.head_parameters)
        attention = 4 * pairs * shape.heads * shape.head_dim * shape.layers
        cached = 2 * keys * shape.kv_heads * shape.head_dim * shape.layers
        return Cost(
            items=items,
            unit="tokens",
            bytes_moved=times * size * (shape.parameters + cached),
            operations=times * (matrices + attention),
            dtype=self.dtype,
        )

    def _visible_pairs(self) -> int:
        """Pairs of query and key in one sequence of `length` tokens."""
        window = min(self.window or self.length, self.length)
        return window * (window + 1) // 2 + (self.length - window) * window


@dataclass(frozen=True, kw_only=True)
class Generation(ModelCase):
    """``generate`` from a prompt, greedily.

    Attributes:
        chunk: ``prefill_chunk_size`` of both versions.
        compiled: The subject's step is compiled, the reference's is not.
        fused: The subject's projections are fused.
    """

    chunk: int | None = None
    compiled: bool = False
    fused: bool = False

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the new tokens ``[B, tokens]``."""
        prompt = self.ids(self.length)
        if self.fused and version == SUBJECT:
            model.fuse_projections()

        def generate(tokens: int = self.tokens) -> Tensor:
            options = {"max_new_tokens": tokens, "do_sample": False, "prefill_chunk_size": self.chunk}
            if self.compiled and version == SUBJECT:
                options |= {"cache_implementation": "static", "compile_config": compilation}
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, self.length :]

        compilation = CompileConfig(mode="default")
        compilation._compile_all_devices = True
        if self.chunk is None:
            generate(2)
        return generate

    def cost(self) -> Cost:
        """A decoding step for every token; the prompt counts only if it is read in chunks."""
        if self.chunk is not None:
            return self._cost(self.length, self.length, self.tokens, self._visible_pairs(), keys=0)
        keys = self.batch * (self.length + self.tokens // 2)
        return self._cost(self.batch * self.tokens, self.batch, self.batch, keys, keys, times=self.tokens)


@dataclass(frozen=True, kw_only=True)
class Decoding(ModelCase):
    """Decoding steps on a cache that already holds `length` tokens (random keys and values).

    Attributes:
        through: "forward", one call a token; or "generate".
        reference_cache: The cache of the reference, "dynamic" (its default) or "static"; the subject uses its default.
    """

    through: str = "forward"
    reference_cache: str = "dynamic"

    def prepare(self, model: Any, version: str) -> Run:
        """A run continues where the last one ended; it returns the last logits ``[B, V]`` or the new tokens."""
        cache = self._filled_cache(model, version)
        run = self._steps(model, cache) if self.through == "forward" else self._generation(model, cache)
        run()
        return run

    def cost(self) -> Cost:
        """A decoding step for every token."""
        keys = self.batch * min(self.length, self.window or self.length)
        return self._cost(self.batch * self.tokens, self.batch, self.batch, keys, keys, times=self.tokens)

    def _filled_cache(self, model: Any, version: str) -> Cache:
        cache: Cache
        if version == SUBJECT:
            cache = mistral_hf.RollingCache(model.config)
        elif self.reference_cache == "static":
            cache = StaticCache(config=model.config, max_cache_len=2 * self.length)
        else:
            cache = DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(1)
        size = (2, self.batch, self.shape.kv_heads, self.length, self.shape.head_dim)
        for layer in range(self.shape.layers):
            cache.update(*torch.randn(size, generator=generator).to(model.dtype), layer)
        return cache

    def _steps(self, model: Any, cache: Cache) -> Run:
        new = self.ids(self.tokens)

        @torch.no_grad()
        def run() -> Tensor:
            for step in range(self.tokens):
                logits = model(new[:, step : step + 1], past_key_values=cache, use_cache=True).logits
            return logits[:, -1]

        return run

    def _generation(self, model: Any, cache: Cache) -> Run:
        def run() -> Tensor:
            ids = self.ids(int(cache.get_seq_length()) + 1)
            options = {"max_new_tokens": self.tokens, "do_sample": False, "past_key_values": cache}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]

        return run


class Prefill(ModelCase):
    """A prompt through the model, with a cache, for the last token's logits: what ``generate`` does first."""

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the last logits ``[B, V]``."""
        prompt = self.ids(self.length)

        @torch.no_grad()
        def run(length: int = self.length) -> Tensor:
            return model(prompt[:, :length], use_cache=True, logits_to_keep=1).logits[:, -1]

        run(min(WARM_UP, self.length))
        return run

    def cost(self) -> Cost:
        """One forward pass."""
        tokens = self.batch * self.length
        return self._cost(tokens, tokens, self.batch, self.batch * self._visible_pairs(), keys=0)


class Training(ModelCase):
    """One step: forward, backward and AdamW."""

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the loss and the norm of the gradient, ``[2]``."""
        ids = self.ids(self.length)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run(length: int = self.length) -> Tensor:
            loss = model(ids[:, :length], labels=ids[:, :length], use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack([loss.detach(), norm])

        run(min(WARM_UP, self.length))
        return run

    def cost(self) -> Cost:
        """A forward pass with all logits, and a backward pass of twice its operations."""
        tokens = self.batch * self.length
        return self._cost(tokens, tokens, tokens, self.batch * self._visible_pairs(), keys=0, times=3)


class Loading(ModelCase):
    """``from_pretrained`` of a saved checkpoint that lies in the page cache."""

    def load(self, version: str, attention: str) -> tempfile.TemporaryDirectory[str]:
        """A folder with the checkpoint, as the reference saves it."""
        disable_progress_bar()
        folder = tempfile.TemporaryDirectory()
        super().load(REFERENCE, attention).save_pretrained(folder.name)
        return folder

    def prepare(self, folder: tempfile.TemporaryDirectory[str], version: str) -> Run:
        """A run returns a sum over the weights of every layer."""
        model_class = IMPLEMENTATIONS[version].model_class

        def run() -> Tensor:
            model = model_class.from_pretrained(folder.name)
            return torch.stack([layer.mlp.down_proj.weight[0].sum().detach() for layer in model.model.layers])

        run()
        return run

    def cost(self) -> Cost:
        """Every weight is read and written once."""
        size = self.shape.parameters * getattr(torch, self.dtype).itemsize
        return Cost(items=1, unit="loads", bytes_moved=2 * size, operations=0)


IMPORT_REFERENCE = "import torch, transformers.models.mistral.modeling_mistral"
IMPORT_SUBJECT = "import mistral_hf"
IMPORT_DETAILS = f"""
import json, sys, time
{IMPORT_REFERENCE}
before, start = set(sys.modules), time.perf_counter()
{IMPORT_SUBJECT}
seconds, new = time.perf_counter() - start, set(sys.modules) - before
print(json.dumps({{"seconds": seconds, "modules": sorted(new)}}))
"""


class Importing(Case):
    """An interpreter that imports torch and the library's Mistral, and with the subject this package too."""

    def tiny(self) -> "Importing":
        """The same, once."""
        return replace(self, repeats=1)

    def with_layers(self, layers: int) -> "Importing":
        """There is no model here."""
        return self

    def load(self, version: str, attention: str) -> str:
        """The program."""
        return IMPORT_REFERENCE if version == REFERENCE else f"{IMPORT_REFERENCE}; {IMPORT_SUBJECT}"

    def prepare(self, program: str, version: str) -> Run:
        """A run starts a process and has no result."""

        def run() -> None:
            _python(program)

        run()
        return run

    def cost(self) -> Cost:
        """There is no limit to compare with."""
        return Cost(items=1, unit="imports", bytes_moved=0, operations=0)

    def details(self) -> dict[str, Any]:
        """Seconds of ``import mistral_hf`` alone, once the others are there, and the modules that it adds."""
        found = [json.loads(_python(IMPORT_DETAILS)) for _ in range(self.repeats)]
        modules = found[0]["modules"]
        return {
            "added_seconds": statistics.median(sample["seconds"] for sample in found),
            "added_modules": len(modules),
            "added_packages": sorted({module.split(".")[0] for module in modules}),
        }


def _python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
