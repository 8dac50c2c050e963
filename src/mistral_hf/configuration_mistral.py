"""The configuration of a Mistral model: typed, validated, free of any tensor framework."""

from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# The names of the activations of Transformers (transformers.activations needs torch, which this file must not import).
ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
        *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu"),
        *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
    }
)

_FLOAT32 = 2.0**128  # numbers from here on are infinite in float32
# Numbers and lists of numbers among rope parameters.
_POSITIVE_ROPE = {
    *("rope_theta", "factor", "attention_factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
}
_OTHER_ROPE = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor", "llama_4_scaling_beta"}

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")  # only mixtures of experts have one of them
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@strict
class MistralConfig(PreTrainedConfig):
    """Configuration of a Mistral model, field by field that of the reference implementation.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads; it divides `num_attention_heads` (None: equal to it).
        head_dim: Width of a head, even (None: ``hidden_size // num_attention_heads``).
        hidden_act: Activation of the gate, by its name in Transformers.
        max_position_embeddings: Longest sequence that the model was trained for, in tokens.
        initializer_range: Standard deviation of freshly initialised weights.
        rms_norm_eps: Epsilon of the RMS normalisations.
        use_cache: Whether forward returns a key/value cache by default.
        pad_token_id: Id of the padding token, or None.
        bos_token_id: Id of the token that begins a sequence.
        eos_token_id: Id, or ids, of the token that ends a sequence.
        tie_word_embeddings: Whether the output layer shares the input embeddings' weights.
        rope_parameters: ``rope_type``, ``rope_theta`` and the fields of the type, as in Transformers 5. The top-level
            ``rope_theta`` and ``rope_scaling`` of older files are read too.
        sliding_window: W, the number of keys a query sees, itself among them; None is full causal attention.
        layer_types: ``"sliding_attention"`` or ``"full_attention"`` for every layer, where they differ; by default all
            layers have the window. Written to a file only if it is set.
        attention_dropout: Dropout probability of the attention weights while training.
        loss_chunk_size: With labels, compute the language-model loss from the logits of that many tokens at a time and
            return no logits; None returns all of them. Written to a file only if it is set.
        label_smoothing: Share of the target probability that the language-model loss spreads evenly over the
            vocabulary. Written to a file only if it is not 0.

    Raises:
        ValueError: A field breaks a rule; the message names the field, the value and the rule.
    """

    model_type = "mistral"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    attention_dropout: float | int = 0.0
    loss_chunk_size: int | None = None
    label_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for parameters in (self.rope_parameters, kwargs.get("rope_scaling")):  # before the library computes with them
            self._check_rope(parameters)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from the content of a ``config.json``, as the library does.

        Raises:
            ValueError: It is the configuration of a mixture of experts.
        """
        for fields in (config_dict, config_dict.get("text_config") or {}):
            if any(fields.get(name) for name in _EXPERTS):
                named = (config_dict.get("architectures") or ["class"])[0]
                raise ValueError(
                    f"{cls.__name__}: model_type={config_dict.get('model_type')!r:.200} is a mixture of experts, which"
                    f" mistral_hf does not have: use the library's {named!s:.200}, which the Auto classes give."
                )
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_shape(self) -> tuple[int, int, int]:
        """H, K and D: query heads, key/value heads and head_dim; a validated configuration has all three."""
        return self.num_attention_heads, cast(int, self.num_key_value_heads), cast(int, self.head_dim)

    def window_of(self, layer_idx: int) -> int | None:
        """W of a decoder layer, None for full attention."""
        full = self.layer_types is not None and self.layer_types[layer_idx] == FULL
        return None if full else self.sliding_window

    @property
    def layer_windows(self) -> list[int | None]:
        """W of every decoder layer, None for full attention."""
        return [self.window_of(layer_idx) for layer_idx in range(self.num_hidden_layers)]

    @property
    def shared_window(self) -> int | None:
        """W of all layers, for models that have one.

        Raises:
            ValueError: The windows of the layers differ.
        """
        windows = set(self.layer_windows) or {self.sliding_window}
        if len(windows) > 1:
            raise ValueError(
                f"layer_types={self.layer_types!r:.200} give layers windows that differ, which the JAX and TensorFlow"
                " ports do not have: use the PyTorch models."
            )
        return windows.pop()

    @property
    def query_scaling(self) -> tuple[float, int] | None:
        """Beta and the number of positions in the scaling of queries by their position; None without one."""
        return None

    def problem_type_for(self, *, floating_point: bool) -> str:
        """What a sequence classification head is trained to do, given the kind of its labels.

        `problem_type`, or where that is None: regression for one output, else multi-label classification for
        floating-point labels and single-label classification for integers.

        Raises:
            ValueError: `problem_type` is not one of `PROBLEM_TYPES`.
        """
        if self.problem_type is None:
            classification = "multi_label_classification" if floating_point else "single_label_classification"
            return "regression" if self.num_labels == 1 else classification
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"config.problem_type={self.problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}, or None."
            )
        return cast(str, self.problem_type)

    def to_dict(self) -> dict[str, Any]:
        """All fields; those that only this package has are left out unless set, since others read the file too."""
        own = {"loss_chunk_size": None, "label_smoothing": 0.0, "layer_types": None}
        return {name: value for name, value in super().to_dict().items() if name not in own or value != own[name]}

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: A field breaks a rule; the message names the field, the value and the rule.
        """
        heads, kv_heads, head_dim = self.num_attention_heads, self.num_key_value_heads or 0, self.head_dim or 0
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check("num_hidden_layers", self.num_hidden_layers >= 0, "must not be negative")
        self._check("max_position_embeddings", self.max_position_embeddings >= 1, "must be at least 1")
        self._check(
            "num_attention_heads",
            heads % kv_heads == 0,
            f"must be divisible by num_key_value_heads={kv_heads}",
        )
        self._check("head_dim", head_dim >= 2 and head_dim % 2 == 0, "must be even and at least 2 (RoPE)")
        self._check(
            "sliding_window",
            self.sliding_window is None or self.sliding_window >= 1,
            "must be at least 1, or null for full attention",
        )
        self._check("rms_norm_eps", 0 < self.rms_norm_eps < _FLOAT32, "must be positive and finite")
        self._check("initializer_range", 0 <= self.initializer_range < _FLOAT32, "must be finite and not negative")
        self._check("attention_dropout", 0 <= self.attention_dropout < 1, "must lie in [0, 1)")
        self._check(
            "loss_chunk_size",
            self.loss_chunk_size is None or self.loss_chunk_size >= 1,
            "must be at least 1 token, or None for all tokens together",
        )
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "must lie in [0, 1)")
        self._check("hidden_act", self.hidden_act in ACTIVATIONS, f"must be one of {', '.join(sorted(ACTIVATIONS))}")
        self._check_rope(self.rope_parameters)
        self._check_layer_types()

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r:.200} {rule}.")

    def _check_rope(self, parameters: Any) -> None:
        """Check the numbers among rope parameters, with which the library computes as they are."""
        if parameters is None:
            return
        owner = type(self).__name__
        if not isinstance(parameters, dict):
            raise ValueError(f"{owner}: rope_parameters={parameters!r:.200} must be an object, or null.")
        kind = parameters.get("rope_type", parameters.get("type"))
        needed = {"rope_theta"} | ({"factor"} if kind in ("linear", "dynamic", "llama3") else set())
        for name, value in parameters.items():
            if isinstance(value, dict):  # the parameters of one layer type
                self._check_rope(value)
            elif name in _POSITIVE_ROPE | _OTHER_ROPE and (value is not None or name in needed):
                positive, numbers = name in _POSITIVE_ROPE, value if isinstance(value, list | tuple) else [value]
                if not all(_is_number(n) and 0 <= n < _FLOAT32 and (n or not positive) for n in numbers):
                    rule = f"be {'positive' if positive else 'not negative'} and finite"
                    raise ValueError(
                        f"{type(self).__name__}: rope_parameters has {name}={value!r:.200}, which must {rule}."
                    )
        if kind == "yarn" and parameters.get("rope_theta", 2) <= 1:
            raise ValueError(
                f"{type(self).__name__}: rope_theta={parameters['rope_theta']!r} must be more than 1 with yarn."
            )

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        for index, kind in enumerate(self.layer_types):
            self._check("layer_types", kind in (SLIDING, FULL), f"has {kind!r} at {index}; known are {SLIDING}, {FULL}")
        self._check(
            "layer_types",
            len(self.layer_types) >= self.num_hidden_layers,
            f"must have an entry for each of num_hidden_layers={self.num_hidden_layers}",
        )
        self._check(
            "layer_types",
            self.sliding_window is not None or SLIDING not in self.layer_types,
            "has windows, but sliding_window is None: give its size",
        )
