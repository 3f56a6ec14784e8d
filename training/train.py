"""Train one of the two bundled models: tokenizer, model, log, all in Hugging Face transformers format.

Reads CORPUS/train.txt.xz and CORPUS/heldout.txt (see corpus.py).  The byte-level BPE tokenizer is trained
once and kept as CORPUS/tokenizer.json.  Training runs for a number of seconds of optimisation (compilation
not counted): AdamW, warmup, linear decay to zero, bf16 autocast; the last part uses longer sequences.

Example: train.py qwen2-d128 --corpus corpus --out models --seconds 180
"""

import argparse
import json
import lzma
import math
import pathlib
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    Qwen2Config,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

VOCAB = 8192
END = "<|endoftext|>"  # token 0; precedes every document
CONTEXT = 8192  # max_position_embeddings
WINDOW = 1024  # tokens of one perplexity window; its second half is scored
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    num_hidden_layers=6,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
CONFIGS = {
    "qwen2-d128": lambda: Qwen2Config(
        **COMMON,
        intermediate_size=512,
        head_dim=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gemma4-d256-512": lambda: Gemma4TextConfig(
        **COMMON,
        intermediate_size=448,
        head_dim=256,
        global_head_dim=512,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=256,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=None,
    ),
}


def training_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Causal attention for unpadded training batches; sliding layers only touch their own and the previous block."""
    batch, heads, length, dim = query.shape
    scale = dim**-0.5 if scaling is None else scaling
    window = sliding_window if sliding_window and sliding_window < length else None
    if window is None and dim <= 256:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None
    kv_heads, group = key.shape[1], heads // key.shape[1]
    step = window or length  # block length
    blocks = length // step
    if blocks * step != length:
        raise ValueError(f"sequence length {length} is not a multiple of the sliding window {step}")
    query = query.view(batch, kv_heads, group, blocks, step, dim)
    key, value = (x.view(batch, kv_heads, 1, blocks, step, dim) for x in (key, value))
    position = torch.arange(step, device=query.device)
    distance = position[:, None] - position[None]
    allowed = distance >= 0
    if window:  # keys of the previous block stand before those of the own block
        key, value = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :, :-1], x], dim=-2) for x in (key, value))
        allowed = torch.cat([distance + step < window, allowed], dim=-1).expand(blocks, step, 2 * step)
        first = (torch.arange(blocks, device=query.device) == 0)[:, None, None]
        allowed = allowed & ~(first & (torch.arange(2 * step, device=query.device) < step))
    scores = (query @ key.transpose(-1, -2)).float() * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(value.dtype)
    out = (weights @ value).reshape(batch, heads, length, dim)
    return out.transpose(1, 2), None


AttentionInterface.register("training", training_attention)
AttentionMaskInterface.register("training", lambda *args, **kwargs: None)


def train_tokenizer(docs):
    """Byte-level BPE with VOCAB tokens from every fourth document, split as Qwen2Tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        docs[::4],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    return tokenizer


def encode(tokenizer, docs):
    """Tokens of all documents in one uint16 array, token 0 before each document."""
    parts = []
    for start in range(0, len(docs), 1000):
        for encoding in tokenizer.encode_batch_fast(docs[start : start + 1000]):
            parts.append(np.array([0] + encoding.ids, dtype=np.uint16))
    return np.concatenate(parts)


def batches(tokens, batch, length, generator):
    """Endless batches [batch, length + 1]; every pass over the tokens has its own offset and order."""
    span = torch.arange(length + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, tokens.numel() - length - 1, length)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(tokens.device)
        if len(starts) < batch:
            raise ValueError(f"{tokens.numel()} training tokens are too few for one batch of {batch} x {length}")
        for row in range(0, len(starts) - batch + 1, batch):
            yield tokens[starts[row : row + batch, None] + span].long()


@torch.no_grad()
def perplexity(model, tokens, batch=8):
    """exp(mean NLL) over the second half of each full window of WINDOW tokens (1-D token tensor -> float)."""
    count = (tokens.numel() - 1) // WINDOW
    if not count:
        raise ValueError(f"perplexity needs more than {WINDOW} tokens, got {tokens.numel()}")
    total, half = 0.0, WINDOW // 2
    for first in range(0, count, batch):
        rows = range(first, min(first + batch, count))
        inputs = torch.stack([tokens[r * WINDOW : (r + 1) * WINDOW] for r in rows]).long()
        target = torch.stack([tokens[r * WINDOW + 1 : (r + 1) * WINDOW + 1] for r in rows]).long()
        logits = model(input_ids=inputs, use_cache=False).logits[:, half:].float()
        total += F.cross_entropy(logits.flatten(0, 1), target[:, half:].flatten(), reduction="sum").item()
    return math.exp(total / (count * half))


def train(config, tokens, heldout, args, log):
    """Train one model from scratch on a 1-D token tensor; returns it in evaluation mode, weights in float32."""
    device = tokens.device.type
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="training", dtype=torch.float32)
    model = model.to(device).train()
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() <= 1]]
    optimizer = torch.optim.AdamW(
        [dict(params=groups[0], weight_decay=0.1), dict(params=groups[1], weight_decay=0.0)],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(x, y):
        return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    def forward_backward(data):
        data = next(data)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(data[:, :-1].contiguous(), data[:, 1:].contiguous())
        loss.backward()
        return loss.detach()

    compiled = torch.compile(loss_of, dynamic=False) if device == "cuda" else loss_of
    long = args.long_length
    phases = [
        batches(tokens, args.batch, args.length, generator),
        batches(tokens, args.batch * args.length // long, long, generator),
    ]
    compile_start = time.time()
    for data in phases:  # compile every shape before the clock starts
        forward_backward(data)
        optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    log(
        event="start",
        parameters=sum(p.numel() for p in model.parameters()),
        train_tokens=tokens.numel(),
        setup_seconds=round(time.time() - compile_start, 1),
        lr=args.lr,
        batch=args.batch,
        length=args.length,
        long_length=long,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        torch=torch.__version__,
    )
    start, step, per_step = time.time(), 0, args.batch * args.length
    while (done := (time.time() - start) / args.seconds) < 1:
        lr = args.lr * min((step + 1) / args.warmup, 1.0) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = forward_backward(phases[done >= 1 - args.long_share])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0:
            value, seconds = loss.item(), time.time() - start
            record = dict(
                step=step,
                loss=round(value, 4),
                lr=round(lr, 7),
                tokens=step * per_step,
                tokens_per_second=round(step * per_step / seconds),
                seconds=round(seconds, 1),
            )
            if not math.isfinite(value):
                raise RuntimeError(f"loss is {value} at step {step}: lower --lr")
            if step % (args.log_every * 5) == 0:
                record["heldout_ppl"] = round(perplexity(model, heldout), 4)
            log(**record)
    model.eval()
    log(event="end", step=step, tokens=step * per_step, seconds=round(time.time() - start, 1))
    return model


def save(model, tokenizer_file, folder):
    """Write the model in bfloat16 with its tokenizer; the folder loads with the Auto classes."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    kind = "Qwen2Tokenizer" if model.config.model_type == "qwen2" else "TokenizersBackend"
    settings = dict(
        tokenizer_class=kind,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS, help="which model to train")
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="folder with train.txt.xz and heldout.txt")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder that gets a folder named like the model")
    parser.add_argument("--seconds", type=float, default=180, help="seconds of training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step at --length (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--long-length", type=int, default=4096, help="tokens a sequence at the end (default: %(default)s)")
    parser.add_argument("--long-share", type=float, default=0.2, help="share of the time for it (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=200, help="warmup steps (default: %(default)s)")
    parser.add_argument("--log-every", type=int, default=100, help="steps between log lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few steps on little text: tries the script on a CPU")
    args = parser.parse_args()
    if min(args.seconds, args.lr, args.batch, args.length, args.warmup, args.log_every) <= 0:
        parser.error("--seconds, --lr, --batch, --length, --warmup and --log-every must be positive")
    if args.tiny:
        args.seconds, args.batch, args.length, args.long_length, args.log_every = min(args.seconds, 10), 2, 256, 512, 1
    if args.long_length % args.length or args.batch * args.length % args.long_length:
        parser.error("--long-length must be a multiple of --length and divide --batch times --length")
    if not 0 <= args.long_share <= 1:
        parser.error("--long-share must be between 0 and 1")
    for name in ("train.txt.xz", "heldout.txt"):
        if not (args.corpus / name).is_file():
            parser.error(f"{args.corpus / name} is missing: run corpus.py first")

    folder = args.out / args.model
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with open(folder / "training_log.jsonl", "w") as file:

        def log(**record):
            line = json.dumps(record)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        with lzma.open(args.corpus / "train.txt.xz") as stream:
            docs = stream.read(2_000_000 if args.tiny else -1).decode("utf-8", "ignore").split("\0")[1:]
        tokenizer_file = args.corpus / "tokenizer.json"
        if not tokenizer_file.exists():
            train_tokenizer(docs).save(str(tokenizer_file), pretty=False)
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokens = torch.from_numpy(encode(tokenizer, docs).astype(np.int32)).to(device)
        ids = tokenizer.encode((args.corpus / "heldout.txt").read_text("utf-8")).ids
        heldout = torch.tensor(ids[:5000] if args.tiny else ids, device=device)
        log(
            event="data",
            model=args.model,
            documents=len(docs),
            train_tokens=tokens.numel(),
            bytes_per_token=round(sum(len(d.encode()) for d in docs) / tokens.numel(), 3),
            heldout_tokens=heldout.numel(),
            seconds=round(time.time() - started, 1),
        )
        model = train(CONFIGS[args.model](), tokens, heldout, args, log)
        save(model, tokenizer_file, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        torch.set_float32_matmul_precision("highest")
        log(
            event="final",
            heldout_ppl=round(perplexity(model, heldout, batch=2 if args.tiny else 8), 4),
            dtype="float32",
            weights="bfloat16",
            weight_bytes=(folder / "model.safetensors").stat().st_size,
        )


if __name__ == "__main__":
    main()
