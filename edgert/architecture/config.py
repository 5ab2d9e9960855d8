"""The fields of a `config.json`, each looked at before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgert.architecture.families import FAMILIES, LLAMA
from edgert.errors import UsageError

MAX_WIDTH = 2**20  # of any field but those below; the widest known are vocabularies of 2^18
MAX_LAYERS = 2048
MAX_EXPERTS = 4096
MAX_CONTEXT = 2**30
_FULL_LAYERS = ("full_attn_idxs", "attn_layer_indices")  # LFM2 and Bamba


class Numbers:
    """Numbers that somebody else wrote, each looked at before it is used; those that are null are left out."""

    def __init__(self, data: Mapping[str, Any], family: str) -> None:
        self.data = {name: value for name, value in data.items() if value is not None}
        self.family = family

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_WIDTH) -> int:
        """The first of these fields that is there."""
        name = next((n for n in names if n in self.data), None)
        if name is None:
            if default is None:
                raise UsageError(f"model configuration ({self.family}): it has no field {names[0]!r}")
            return default
        return limited(name, self.data[name], least, most)

    def number(self, name: str, *, default: float) -> float:
        """A positive number that need not be whole."""
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_WIDTH:
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected a number above 0")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """A field that is true or false."""
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected true or false")
        return value

    def indices(self, name: str) -> set[int]:
        """A list of numbers of layers; empty where there is none."""
        return {limited(name, item, 0, MAX_LAYERS) for item in self.items(name)}

    def items(self, name: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self.data.get(name, [])
        if not isinstance(value, list):
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected a list")
        return value


class Fields(Numbers):
    """The fields of a configuration of a text model, or of a model with one in it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.notes: list[str] = []
        text = data.get("text_config")
        if isinstance(text, Mapping):
            above = {key: data[key] for key in ("tie_word_embeddings",) if key in data}
            data = {**above, **text}
        super().__init__(data, str(data.get("model_type") or "unknown")[:60])
        self.traits = FAMILIES.get(self.family, LLAMA)
        self.data = {**self.traits.defaults, **self.data}
        self.data |= {name: self.data[own] for name, own in self.traits.names.items() if own in self.data}
        if self.family not in FAMILIES:
            self.notes.append(f"model_type {self.family!r} is not known: taken for one like Llama")
        self.hidden = self.size("hidden_size", "n_embd")
        self.norm_width = 2 if self.traits.norm_bias else 1  # vectors of a norm
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

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix; LFM2 has a name of its own for it."""
        name = "tie_embedding" if "tie_embedding" in self.data else "tie_word_embeddings"
        return self.flag(name, default=self.traits.tied)

    def layer_kinds(self) -> list[str]:
        """For each layer `full_attention`, `sliding_attention` and so on."""
        given = self.items("layer_types")
        if given:
            if len(given) != self.layers or not all(isinstance(kind, str) for kind in given):
                raise UsageError(f"model configuration: layer_types has {len(given)} items for {self.layers} layers")
            return given
        if self.traits.every is not None:
            return self._patterned(*self.traits.every)
        if self.family.startswith("qwen") and not self.flag("use_sliding_window", default=False):
            return ["full_attention"] * self.layers
        first = self.size("max_window_layers", default=0, least=0) if self.family.startswith("qwen") else 0
        windowed = "sliding_attention" if "sliding_window" in self.data else "full_attention"
        return ["full_attention" if i < first else windowed for i in range(self.layers)]

    def _patterned(self, every: int, other: str) -> list[str]:
        """Kinds of layers where they follow from a rule or from a list of those that attend to all tokens."""
        full = next((self.indices(name) for name in _FULL_LAYERS if name in self.data), None)
        if full is not None:
            return ["full_attention" if i in full else other for i in range(self.layers)]
        pattern = self.data.get("sliding_window_pattern")
        if isinstance(pattern, str) and pattern:  # EXAONE's "LLLG": local ones, then a global one
            letters = (pattern[i % len(pattern)] for i in range(self.layers))
            return ["full_attention" if letter == "G" else other for letter in letters]
        if self.traits.encoder:  # ModernBERT counts from the first layer
            every = self.size("global_attn_every_n_layers", default=every)
            return ["full_attention" if i % every == 0 else other for i in range(self.layers)]
        names = ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval")
        every = self.size(*names, default=every)
        return ["full_attention" if (i + 1) % every == 0 else other for i in range(self.layers)]


def limited(name: str, value: Any, least: int, most: int) -> int:
    """`value`, if it is an integer from `least` to `most`; `UsageError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected an integer")
    if not least <= value <= most:
        shown = value if abs(value) < 10**18 else f"{'-' if value < 0 else ''}more than 10^18"
        raise UsageError(f"model configuration: {name} is {shown}, expected {least} to {most}")
    return value
