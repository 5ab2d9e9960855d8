"""Train the language model of this repository, `bookworm`, on public-domain books.

    python train_bookworm.py --train books-train.txt.xz --heldout books-heldout.txt --minutes 55 --out bookworm

A 3.8 M parameter Qwen3 decoder (hidden 256, every matrix dimension a multiple of 128, so that group-128 INT4 is real),
its 4096-token BPE tokenizer and its chat template. The corpus is plain text whose books are separated by lines holding
`<|endoftext|>`. A tenth of what the model sees are conversations: neighbouring paragraphs of dialogue out of the same
books, laid out by the chat template, so that `chat` has something to say.

Hidden matrices are trained with Muon (Jordan et al. 2024, torch.optim.Muon), embeddings and norms with AdamW, on a
trapezoidal schedule. Bits per byte are taken on held-out books, in windows of the training context, each window scored
from its second token on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, TURN, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 4096
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_books(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    return [book.strip() for book in text.split(END) if book.strip()]


def conversations(book: str) -> list[str]:
    """Runs of two to six paragraphs that open with a quotation mark, as chat."""
    found, run = [], []
    for paragraph in [*book.split("\n\n"), ""]:
        spoken = paragraph.strip().replace("\n", " ")
        if spoken[:1] in {'"', "\u201c"} and len(spoken) < 400:
            run.append(re.sub(r'^["\u201c]|["\u201d]$', "", spoken))
        if (not spoken or len(run) == 6 or spoken[:1] not in {'"', "\u201c"}) and run:
            if len(run) >= 2:
                turns = run[: len(run) // 2 * 2]
                found.append(
                    "".join(f"{TURN}{('user', 'assistant')[i % 2]}\n{turn}{STOP}\n" for i, turn in enumerate(turns))
                )
            run = []
    return found


def train_tokenizer(books: list[str], out: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((book[:400_000] for book in books), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        additional_special_tokens=[TURN, STOP],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    compact = json.loads((out / "tokenizer.json").read_text("utf-8"))
    (out / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")), "utf-8")
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    pieces: list[int] = []
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 64]):
            pieces += [*encoding.ids, end]
    return np.array(pieces, dtype=np.uint16)


def configuration(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def bits_per_byte(model: Qwen3ForCausalLM, tokens: np.ndarray, byte_count: int, context: int) -> float:
    """Bits per byte of `tokens` (1-D), in windows of `context`; `byte_count` UTF-8 bytes is what they decode to."""
    nats, scored = 0.0, 0
    for start in range(0, len(tokens) - 1, context):
        window = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64))[None]
        logits = model(window[:, :-1], use_cache=False).logits.float()
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        scored += window.shape[1] - 1
    return nats / math.log(2) / (byte_count * scored / len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=4e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    options.out.mkdir(parents=True, exist_ok=True)

    books = read_books(options.train)
    random.shuffle(books)
    tokenizer = train_tokenizer(books, options.out)
    chats = [chat for book in books for chat in conversations(book)]
    random.shuffle(chats)
    prose, talk = encode(tokenizer, books), encode(tokenizer, chats)
    heldout_text = "\n\n".join(read_books(options.heldout))
    heldout = encode(tokenizer, [heldout_text])
    heldout_bytes = len(heldout_text.encode("utf-8"))
    sample = heldout[:60_000]
    print(
        f"{len(prose)} tokens of prose, {len(talk)} of conversation, {heldout_bytes / len(heldout):.2f} bytes/token",
        flush=True,
    )

    model = Qwen3ForCausalLM(configuration(tokenizer))
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimizers = [
        torch.optim.Muon(hidden, lr=options.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    order = np.random.default_rng(0)
    cursor = 0

    def batch(context: int) -> torch.Tensor:
        """One pass over the prose in order, from rows spread over all books; every tenth row is conversation."""
        nonlocal cursor
        rows = options.batch_tokens // context
        stride = len(prose) // rows
        picked = []
        for row in range(rows):
            if order.random() < 0.1:
                start = int(order.integers(0, len(talk) - context - 1))
                picked.append(talk[start : start + context + 1])
            else:
                start = (row * stride + cursor) % (len(prose) - context - 1)
                picked.append(prose[start : start + context + 1])
        cursor += context
        return torch.from_numpy(np.stack(picked).astype(np.int64))

    compiled = torch.compile(model, dynamic=False)  # fuses the element-wise work: 2x and more on a CPU
    begin, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        progress = (time.monotonic() - begin) / (options.minutes * 60)
        scale = min(1.0, (step + 1) / 100) * (1.0 if progress < 0.55 else max(0.01, (1.0 - progress) / 0.45))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * scale
        tokens = batch(256 if progress < 0.7 else CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            speed = step * options.batch_tokens / (time.monotonic() - begin)
            line = f"step {step} loss {loss.item():.3f} {speed:.0f} tokens/s {progress:.0%}"
            if step % 500 == 0:
                sample_bytes = int(heldout_bytes * len(sample) / len(heldout))
                line += f" held-out {bits_per_byte(model, sample, sample_bytes, CONTEXT):.3f} bits per byte"
            print(line, flush=True)

    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(STOP)]
    model.save_pretrained(options.out)
    final = bits_per_byte(model.float(), heldout, heldout_bytes, CONTEXT)
    log = {
        "steps": step,
        "tokens": step * options.batch_tokens,
        "minutes": options.minutes,
        "heldout_bits_per_byte": round(final, 4),
    }
    (options.out / "training.json").write_text(json.dumps(log, indent=2) + "\n", "utf-8")
    print(log, flush=True)


if __name__ == "__main__":
    main()
