"""The tokenizer in a GGUF file's metadata becomes tokenizer.json and tokenizer_config.json.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgert.errors import ConversionError

_CONTROL, _USER_DEFINED = 3, 4
# Pre-tokenizers by `tokenizer.ggml.pre`, as in the tokenizer.json of Llama 3 and Qwen 2; None is GPT-2's own.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "default": None,
    "llama-bpe": _WORDS % "{1,3}",
    "llama3": _WORDS % "{1,3}",
    "qwen2": _WORDS % "",
}


def write_tokenizer(fields: dict[str, Any], folder: Path) -> Tokenizer:
    """Write the tokenizer of a GGUF file, whose metadata are `fields`, into the new `folder`.

    Raises:
        ConversionError: there is none, or one of a kind that edgert does not know.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if kind not in {"gpt2", "llama"} or not isinstance(tokens, list) or not tokens:
        raise ConversionError(f"GGUF tokenizer: tokenizer.ggml.model is {kind!r}, expected gpt2 or llama, with tokens")
    try:
        tokenizer = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens)
        kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        tokenizer.add_special_tokens([_added(t, True) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL])
        tokenizer.add_tokens([_added(t, False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED])
        names = {role: _token(fields, tokens, f"{key}_token_id") for role, key in
                 (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    except ConversionError:
        raise
    except Exception as error:  # tokenizers raises plain Exception; lists of other lengths ValueError
        raise ConversionError(f"GGUF tokenizer: {type(error).__name__}: {error}") from error
    implied = kind == "llama" or fields.get("tokenizer.ggml.pre") in {"llama-bpe", "llama3"}
    if names["bos"] and fields.get("tokenizer.ggml.add_bos_token", implied):
        bos = names["bos"]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        steps = [tokenizer.post_processor, template] if tokenizer.post_processor else [template]
        tokenizer.post_processor = processors.Sequence(steps)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {f"{role}_token": name for role, name in names.items() if name}
    if fields.get("tokenizer.chat_template"):
        config["chat_template"] = fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
    return tokenizer


def end_tokens(fields: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: end of sequence and, where a chat model has one, end of turn."""
    found = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(dict.fromkeys(int(number) for number in found if number is not None))


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ConversionError(f"GGUF tokenizer: pre-tokenizer {pre!r} is not among {', '.join(_SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = _SPLITS[pre]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        tokenizer.pre_tokenizer = level
    else:
        parts = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = fields.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ConversionError(f"GGUF tokenizer: {len(scores)} scores for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    # A piece arises from any two pieces that make it up, best score first, as in transformers' SentencePieceExtractor.
    merges: list[tuple[str, str, float]] = []
    for token, score in zip(tokens, scores, strict=True):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        cuts = [(left, right, score) for left, right in halves if left in vocab and right in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    merges.sort(key=lambda merge: merge[2], reverse=True)
    unknown = _token(fields, tokens, "unknown_token_id")
    pairs = [(left, right) for left, right, _ in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _token(fields: dict[str, Any], tokens: list[str], key: str) -> str | None:
    number = fields.get(f"tokenizer.ggml.{key}")
    if number is None:
        return None
    if not 0 <= int(number) < len(tokens):
        raise ConversionError(f"GGUF tokenizer: {key} is {number}, there are {len(tokens)} tokens")
    return str(tokens[int(number)])


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)
