"""Train a tiny sparse-MoE language model and save it in Hugging Face layout: the two bundled models come from here.

    python make_corpus.py --en DIR --de DIR --out corpus
    python train_tiny_moe.py --corpus corpus --out tiny-moe                          # Qwen3-MoE, 4 layers, 16 experts, top 2
    python train_tiny_moe.py --teacher tiny-moe --out tiny-moe-b --family mixtral --layers 2 --experts 7 --inner 512 \\
        --kv-heads 1 --steps 4000 --lr 1e-3 --save-every 250

With --teacher nothing but another model is needed: the student learns the teacher's next-token distributions on text that
the teacher sampled itself (so it has never seen a calibration or held-out text), and starts from its embedding and head.

Runs on the CPU (fp32) or on a CUDA GPU (bf16 autocast; give a larger --batch and more --steps there).
With --minutes the learning-rate schedule follows the clock if that is ahead of the step count; without it a run is repeatable.
"""

import argparse
import hashlib
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from save_tiny_moe import EOS, save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MIX = {"english": 0.32, "german": 0.32, "python": 0.24, "math": 0.12}  # share of the sequences


def make_tokenizer(corpus, vocab_size, per_domain=2_500_000):
    """Byte-level BPE with the pre-tokenizer of Qwen2 (llama.cpp's "qwen2"), trained on the same amount of every domain."""
    tok = Tokenizer(models.BPE(ignore_merges=False))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = []
    for domain in MIX:
        text = "".join(p.read_text("utf-8") for p in sorted((corpus / "train" / domain).glob("*.txt")))
        step = max(len(text) // 50, 1)
        texts += [text[i : i + per_domain // 50] for i in range(0, len(text), step)]
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tok


def load_tokens(tok, corpus):
    cache = corpus / f"tokens-{hashlib.sha1(tok.to_str().encode()).hexdigest()[:8]}.pt"
    if cache.exists():
        return torch.load(cache)
    data = {}
    for domain in MIX:
        docs = [p.read_text("utf-8") for p in sorted((corpus / "train" / domain).glob("*.txt"))]
        random.Random(0).shuffle(docs)
        ids = [e.ids + [tok.token_to_id(EOS)] for e in tok.encode_batch(docs)]
        data[domain] = torch.from_numpy(np.concatenate([np.array(i, dtype=np.int64) for i in ids]))
    held = {p.stem: torch.tensor(tok.encode(p.read_text("utf-8")).ids) for p in sorted((corpus / "calibration").glob("*.txt"))}
    torch.save((data, held), cache)
    return data, held


def load_teacher(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval().requires_grad_(False)


@torch.no_grad()
def sample_teacher(teacher, cache, tokens, length=256, batch=512):
    """`tokens` tokens of the teacher's own text, temperature 1, as one stream of documents [tokens]; kept in `cache`."""
    if cache.exists():
        return torch.load(cache)
    rows, eos = [], teacher.config.eos_token_id
    device = next(teacher.parameters()).device
    for i in range(math.ceil(tokens / batch / (length + 1))):
        start = torch.full((batch, 1), eos, device=device)
        rows.append(
            teacher.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=length,
                min_new_tokens=length,
                eos_token_id=None,
                pad_token_id=eos,
            ).cpu()
        )
        print(f"sampled {(i + 1) * batch * (length + 1)} tokens", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(rows).flatten(), cache)
    return torch.load(cache)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        if c.family == "qwen3_moe":
            self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)

    def forward(self, x, rope):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.c.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.c.family == "qwen3_moe":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        cos, sin = rope
        q, k = (y * cos + torch.cat((-y[..., self.c.head_dim // 2 :], y[..., : self.c.head_dim // 2]), -1) * sin for y in (q, k))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MoE(nn.Module):
    """Softmax over all experts, keep the top k, renormalise: the rule of Qwen3-MoE (norm_topk_prob) and of Mixtral."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden, c.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.inner, c.hidden))
        self.down = nn.Parameter(torch.empty(c.experts, c.hidden, c.inner))

    def forward(self, x):
        shape, k, n = x.shape, self.c.top_k, self.c.experts
        x = x.reshape(-1, shape[-1])
        prob = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        weight, index = prob.topk(k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = index.flatten().argsort(stable=True)  # all copies of a token, grouped by expert
        counts = index.flatten().bincount(minlength=n)
        token = order // k
        outs = []
        for part, w_in, w_out in zip(x[token].split(counts.tolist()), self.gate_up.unbind(0), self.down.unbind(0)):
            g, u = F.linear(part, w_in).chunk(2, -1)
            outs.append(F.linear(F.silu(g) * u, w_out))
        y = torch.cat(outs) * weight.flatten()[order, None].to(x.dtype)
        # load-balancing loss over the whole batch, all domains together: experts may specialise, none may starve
        self.aux = n * (counts / counts.sum() * prob.mean(0)).sum()
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype)).view(shape)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden), MoE(c)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyMoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.lm_head = self.embed_tokens if c.tied else nn.Linear(c.hidden, c.vocab, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = 0.02 if name.startswith(("embed", "lm_head")) or "gate.weight" in name else 0.5 * p.shape[-1] ** -0.5
                nn.init.normal_(p, std=0.0 if "o_proj" in name or "down" in name else scale)  # every layer starts as the identity

    def forward(self, ids, targets):
        t, half = ids.shape[1], self.c.head_dim // 2
        freq = self.c.rope_theta ** (-torch.arange(half, device=ids.device, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(t, device=ids.device, dtype=torch.float32), freq).repeat(1, 2)
        x, rope = self.embed_tokens(ids), (angle.cos(), angle.sin())
        for layer in self.layers:
            x = layer(x, rope)
        logits = F.linear(self.norm(x), self.lm_head.weight).float().flatten(0, 1)
        # targets: the next tokens [batch, time], or the teacher's distributions [batch, time, vocab]
        loss = F.cross_entropy(logits, targets.flatten() if targets.dim() == 2 else targets.flatten(0, 1))
        return loss, torch.stack([layer.mlp.aux for layer in self.layers]).mean()


def warm_start(model, data, device, rounds=40, lr=0.05):
    """Fit embedding and head, without the layers between, to the bigram counts: the cheapest third of the training."""
    v = model.c.vocab
    joint = sum(w * torch.bincount(data[d][:-1] * v + data[d][1:], minlength=v * v).float() / len(data[d]) for d, w in MIX.items())
    joint = joint.view(v, v).to(device)
    nn.init.normal_(model.embed_tokens.weight, std=0.3)
    params = [model.embed_tokens.weight, model.lm_head.weight]
    opt = torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95))
    for i in range(rounds):
        opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 5) * min(1, 2 * (rounds - i) / rounds)
        logits = F.linear(model.norm(model.embed_tokens.weight), model.lm_head.weight)
        loss = (joint.sum(1) * logits.logsumexp(1)).sum() - (joint * logits).sum()
        loss.backward()
        opt.step()
        model.zero_grad(set_to_none=True)
    model.embed_tokens.weight.data *= 0.15 / model.embed_tokens.weight.std()  # the scale is free before a norm; leave the layers room
    print(f"bigram warm start: {loss.item():.3f} nats/token on the training text", flush=True)


@torch.no_grad()
def seed_routers(model, batch):
    """Point each router row at one cluster of what its layer sees, so that experts differ and share the load from step 0."""
    for layer in model.layers:
        seen = []
        hook = layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).float()))
        model(batch[:, :-1], batch[:, 1:])
        hook.remove()
        mean = F.normalize(seen[0].mean(0), dim=0)
        x = F.normalize(seen[0] - (seen[0] @ mean)[:, None] * mean, dim=1)
        centre = x[torch.linspace(0, len(x) - 1, model.c.experts).long()]
        for _ in range(15):
            score = x @ centre.T
            for _ in range(20):  # soften towards equal shares (Sinkhorn)
                score = score - 0.05 * (score / 0.05).logsumexp(0)
                score = score - 0.05 * (score / 0.05).logsumexp(1, keepdim=True)
            centre = F.normalize((score / 0.05).exp().T @ x, dim=1)
        layer.mlp.gate.weight.copy_(centre * 4 / seen[0].norm(dim=1).mean())


@torch.no_grad()
def evaluate(model, held, device, seq, windows=16):
    model.eval()
    result = {}
    for name, ids in held.items():
        starts = torch.linspace(0, len(ids) - seq - 1, windows).long()
        x = torch.stack([ids[s : s + seq + 1] for s in starts]).to(device)
        result[name] = round(model(x[:, :-1], x[:, 1:])[0].item(), 3)
    model.train()
    return result


def parse():
    ap = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arg = ap.add_argument
    arg("--corpus", type=Path, help="folder made by make_corpus.py")
    arg("--teacher", type=Path, help="learn from this model instead of a corpus")
    arg("--teacher-tokens", type=int, default=2_100_000, help="how much text the teacher samples")
    arg("--out", type=Path, required=True)
    arg("--tokenizer", type=Path, help="reuse this tokenizer.json")
    arg("--family", choices=["qwen3_moe", "mixtral"], default="qwen3_moe")
    for name, value in dict(
        vocab=4096,
        hidden=256,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        experts=16,
        top_k=2,
        inner=256,
        seq=256,
        long_seq=512,
        batch=8,
        steps=2000,
        warmup=50,
        seed=0,
        rope_theta=10000,
    ).items():
        arg("--" + name.replace("_", "-"), type=int, default=value)
    for name, value in dict(
        lr=7e-4, embed_lr=3e-4, router_lr=3e-4, weight_decay=0.1, aux=0.02, minutes=0.0, long_from=0.8, decay_from=0.3
    ).items():
        arg("--" + name.replace("_", "-"), type=float, default=value)
    arg("--save-every", type=int, default=100)
    arg("--tied", action="store_true", help="share the embedding with the output head (no warm start then)")
    return ap.parse_args()


def open_texts(c, device):
    """The teacher, if there is one, the tokenizer, the tokens to train on and held out by domain, and the mix of domains."""
    if c.teacher:
        teacher = load_teacher(c.teacher).to(device)
        tok = Tokenizer.from_file(str(c.teacher / "tokenizer.json"))
        stream = sample_teacher(teacher, c.out / "samples.pt", c.teacher_tokens).long()
        data, held, mix = {"teacher": stream[16_640:]}, {"teacher": stream[:16_640]}, {"teacher": 1.0}
    else:
        teacher, mix = None, MIX
        tok = Tokenizer.from_file(str(c.tokenizer)) if c.tokenizer else make_tokenizer(c.corpus, c.vocab)
        data, held = load_tokens(tok, c.corpus)
    return teacher, tok, data, held, mix


def start_weights(model, teacher, data, mix, c, device):
    """Weights that training starts from: the teacher's outer matrices or a warm start, and routers that split the tokens."""
    if teacher is not None:
        model.embed_tokens.weight.data.copy_(teacher.model.embed_tokens.weight)
        model.lm_head.weight.data.copy_(teacher.lm_head.weight)
        model.norm.weight.data.copy_(teacher.model.norm.weight)
    elif not c.tied:
        warm_start(model, data, device)
    first = [ids[s : s + c.seq + 1] for d, ids in data.items() for s in torch.linspace(0, len(ids) - c.seq - 1, round(50 * mix[d])).long()]
    seed_routers(model, torch.stack(first).to(device))


def make_optimizer(model, c):
    """AdamW with rates of its own for routers and for what is no matrix of a layer."""
    named = list(model.named_parameters())
    matrix = lambda n, p: p.dim() > 1 and not n.startswith(("embed", "lm_head")) and not n.endswith("gate.weight")
    groups = [
        dict(params=[p for n, p in named if n.endswith("gate.weight")], lr=c.router_lr, weight_decay=0.0),
        dict(params=[p for n, p in named if matrix(n, p)], lr=c.lr, weight_decay=c.weight_decay),
        dict(params=[p for n, p in named if not matrix(n, p) and not n.endswith("gate.weight")], lr=c.embed_lr, weight_decay=0.0),
    ]
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-10, fused=True)
    for g in opt.param_groups:
        g["peak"] = g["lr"]
    return opt


class Draws:
    """Windows drawn from the domains by their mix; golden-ratio steps give every stretch of the run the same mix."""

    def __init__(self, data, mix, c, gen):
        self.data, self.c, self.gen = data, c, gen
        self.domains, self.weights, self.drawn = list(mix), torch.tensor(list(mix.values())).cumsum(0), 0

    def batch(self, seq):
        picks = []
        for _ in range(self.c.batch * self.c.seq // seq):
            self.drawn += 1
            picks.append(min(int(torch.searchsorted(self.weights, self.drawn * 0.6180339887 % 1)), len(self.domains) - 1))
        rows = []
        for d in picks:
            ids = self.data[self.domains[d]]
            s = torch.randint(len(ids) - seq - 1, (1,), generator=self.gen).item()
            rows.append(ids[s : s + seq + 1])
        return torch.stack(rows)


def main():
    c = parse()
    torch.manual_seed(c.seed)
    gen = torch.Generator().manual_seed(c.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, tok, data, held, mix = open_texts(c, device)
    c.vocab = tok.get_vocab_size()
    print("tokens", {k: len(v) for k, v in data.items()}, "vocab", c.vocab, flush=True)
    model = TinyMoE(c).to(device)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    start = time.time()
    start_weights(model, teacher, data, mix, c, device)
    opt = make_optimizer(model, c)
    draws = Draws(data, mix, c, gen)
    seen, log = 0, []
    for step in range(c.steps + 1):
        done = max(step / c.steps, (time.time() - start) / 60 / c.minutes if c.minutes else 0.0)
        if step % c.save_every == 0 or done >= 1:
            scores = evaluate(model, held, device, c.seq)
            print(f"step {step} done {done:.3f} min {(time.time() - start) / 60:.1f} tokens {seen} nats/token {scores}", flush=True)
            save(model, tok, c.out)
        if done >= 1:
            break
        seq = c.seq if done < c.long_from else c.long_seq
        x = draws.batch(seq).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                targets = teacher(x[:, :-1], use_cache=False).logits.softmax(-1) if teacher is not None else x[:, 1:]
            loss, aux = model(x[:, :-1], targets)
        (loss + c.aux * aux).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / c.warmup, 1.0) * min(1.0, max(1 - done, 0.0) / (1 - c.decay_from))
        for g in opt.param_groups:
            g["lr"] = g["peak"] * factor
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen += x[:, 1:].numel()
        log.append(loss.item())
        if step % 20 == 0:
            print(f"step {step} loss {np.mean(log[-20:]):.3f} aux {aux.item():.3f} tok/s {seen / (time.time() - start):.0f}", flush=True)


if __name__ == "__main__":
    main()
