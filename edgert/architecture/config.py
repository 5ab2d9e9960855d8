"""The fields of a `config.json`, each looked at before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgert.errors import UsageError

MAX_WIDTH = 2**20  # of any field but those below; the widest known are vocabularies of 2^18
MAX_LAYERS = 2048
MAX_EXPERTS = 4096
MAX_CONTEXT = 2**30

# Where a configuration leaves fields out, as those of Gemma 3 on the hub do: the defaults of its class in transformers.
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
}  # fmt: skip
# One layer in so many attends to all tokens, the last of each group; the others are of the kind named here.
_PATTERNS: dict[str, tuple[int, str]] = {
    "gemma2": (2, "sliding_attention"),
    "gemma3_text": (6, "sliding_attention"),
    "gemma4_text": (6, "sliding_attention"),
    "cohere2": (4, "sliding_attention"),
    "gpt_oss": (2, "sliding_attention"),
    "llama4_text": (4, "chunked_attention"),
    "qwen3_5_text": (4, "linear_attention"),
    "qwen3_5_moe_text": (4, "linear_attention"),
    "qwen3_next": (4, "linear_attention"),
}
HYBRID_QWEN = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"}
QK_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "gemma4_text", *HYBRID_QWEN}
BIASED = {"gpt2", "gpt_neox"}  # every product has a bias, every norm too, and the FFN has no gate
PARALLEL = {"gpt_neox", "cohere2"}  # attention and FFN beside each other
FOUR_NORMS = {"gemma2", "gemma3_text", "gemma4_text"}  # before and after each half of a layer
LATENT = {"deepseek_v2", "deepseek_v3", "mistral4"}
_USUAL = {"llama", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "phi3", "olmo2", "smollm3"}
_KNOWN = {*_PATTERNS, *QK_NORMS, *BIASED, *LATENT, *_USUAL, "nemotron_h"}


@dataclass
class Fields:
    """The fields of a configuration that somebody else wrote, each looked at before it is used."""

    data: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        text = self.data.get("text_config")
        if isinstance(text, Mapping):
            above = {key: self.data[key] for key in ("tie_word_embeddings",) if key in self.data}
            self.data = {**above, **text}
            self.notes.append("the text model alone: what reads images or sound is left out")
        self.family = str(self.data.get("model_type") or "unknown")[:60]
        self.data = {**_DEFAULTS.get(self.family, {}), **{k: v for k, v in self.data.items() if v is not None}}
        if self.family not in _KNOWN:
            self.notes.append(f"model_type {self.family!r} is not known: taken for one like Llama")
        self.hidden = self.size("hidden_size", "n_embd")
        self.norm_width = 2 if self.family in BIASED else 1
        if self.pattern:
            self.layers = limited("number of layers", len(self.pattern), 1, MAX_LAYERS)
        else:
            self.layers = self.size("num_hidden_layers", "n_layer", most=MAX_LAYERS)

    @property
    def pattern(self) -> list[str]:
        """What each layer of a Nemotron-H is, by letter or by name; empty for other families."""
        named = self.data.get("layers_block_type", self.data.get("hybrid_override_pattern", []))
        known = self.family == "nemotron_h" and isinstance(named, (str, list))
        return [str(layer)[:40] for layer in named] if known else []

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_WIDTH) -> int:
        """The first of these fields that is there."""
        name = next((n for n in names if n in self.data), None)
        if name is None:
            if default is None:
                raise UsageError(f"model configuration ({self.family}): it has no field {names[0]!r}")
            return default
        return limited(name, self.data[name], least, most)

    def flag(self, name: str, *, default: bool) -> bool:
        """A field that is true or false."""
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected true or false")
        return value

    def indices(self, name: str) -> set[int]:
        """A list of numbers of layers; empty where there is none."""
        return {limited(name, item, 0, MAX_LAYERS) for item in self._list(name)}

    def layer_kinds(self) -> list[str]:
        """For each layer `full_attention`, `sliding_attention` and so on."""
        given = self._list("layer_types")
        if given:
            if len(given) != self.layers or not all(isinstance(kind, str) for kind in given):
                raise UsageError(f"model configuration: layer_types has {len(given)} items for {self.layers} layers")
            return given
        if self.family in _PATTERNS:
            every, other = _PATTERNS[self.family]
            names = ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval")
            every = self.size(*names, default=every)
            return ["full_attention" if (i + 1) % every == 0 else other for i in range(self.layers)]
        if self.family.startswith("qwen") and not self.flag("use_sliding_window", default=False):
            return ["full_attention"] * self.layers
        first = self.size("max_window_layers", default=0, least=0) if self.family.startswith("qwen") else 0
        windowed = "sliding_attention" if "sliding_window" in self.data else "full_attention"
        return ["full_attention" if i < first else windowed for i in range(self.layers)]

    def _list(self, name: str) -> list[Any]:
        value = self.data.get(name, [])
        if not isinstance(value, list):
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected a list")
        return value


def limited(name: str, value: Any, least: int, most: int) -> int:
    """`value`, if it is an integer from `least` to `most`; `UsageError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected an integer")
    if not least <= value <= most:
        shown = value if abs(value) < 10**18 else f"{'-' if value < 0 else ''}more than 10^18"
        raise UsageError(f"model configuration: {name} is {shown}, expected {least} to {most}")
    return value
