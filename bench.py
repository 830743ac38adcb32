"""How fast are the three hot paths, against the usual way of doing the same thing?

    python bench.py                     SmolLM2-135M's shape; five to eight minutes on two cores
    python bench.py --sweep=True        how the cost grows with catalog, history and S instead
    python bench.py --memory=True       what training takes of a card's memory, for larger bases too
    python bench.py --out=bench.json    the figures as JSON too

Nothing is downloaded: the weights are random, the catalog is synthetic, with the statistics of
ML-100K's titles (see `titles`). The peer is transformers' LlamaForCausalLM *on the same weights and
adapters* (`twin`), used as its users use it:

(a) corrector  a row for every (history, item), prompt and title one after the other; logits over
               the whole vocabulary at every position; the opponent's pass likewise (both sides run
               theirs, though train.py stores those log-probabilities when it plays)
(b) sft        a row for every target, the titles before it as its prompt
(c) topk       generate(num_beams=20, prefix_allowed_tokens_fn=...) over the same trie

Before anything is timed the two sides must agree: on the loss and every adapter's gradient (a, b),
on the log-probability of every title the beams found, none better than our list holds (c). Then
they run in turns. Ratios are medians of peer / ours; the share of the limit is our operations a
second over those of a large matrix product on the same machine in the same precision.
"""

import dataclasses
import gc
import json
import platform
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import corrector
import judger
import selfplay
from catalog import Catalog, Tokenizer, draw_places, pad
from config import check, exit_code, parse
from machine import choose_device, in_turns, matmul_peak, peak_memory
from model import Model, ModelConfig


@dataclass
class Bench:
    device: str = "auto"        # auto | cuda | cpu | mps
    dtype: str = "auto"         # auto | bfloat16 | float16 | float32
    compile: str = "False"      # True: torch.compile the blocks of both sides for (a) and (b)
    n_titles: int = 1664        # ML-100K's catalog
    history: int = 20           # titles in a prompt
    batch: int = 0              # (a) histories, (b) windows a step; 0: 1 on a CPU, 16 on a GPU
    users: int = 0              # (c) users at a time; 0: 4 on a CPU, 64 on a GPU
    repeats: int = 3            # of every side
    seed: int = 0
    sweep: bool = False         # our side alone, over sizes of catalog, history and S
    memory: bool = False        # what training keeps of a step, computed, for all of BASES
    out: str = ""               # a JSON file to write
    # SmolLM2-135M
    vocab_size: int = 49152
    dim: int = 576
    n_layers: int = 30
    n_heads: int = 9
    n_kv_heads: int = 3
    ffn_dim: int = 1536
    lora_rank: int = 16


# --memory: layers, width, heads, key/value heads, head width, inner width, vocabulary, tied
BASES = {
    "HuggingFaceTB/SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": (32, 960, 15, 5, 64, 2560, 49152, True),
    "Qwen/Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151936, True),
    "meta-llama/Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, True),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "HuggingFaceTB/SmolLM2-1.7B": (24, 2048, 32, 32, 64, 8192, 49152, True),
    "meta-llama/Llama-2-7b-hf": (32, 4096, 32, 32, 128, 11008, 32000, False),
}


# ---------------------------------------------------------------------- a world without downloads

def titles(n, rng, vocab_size):
    """n titles as strings of token numbers, with ML-100K's statistics under SmolLM2's tokenizer at
    n = 1664: 5.6 tokens a title with its newline, 2.0 of them choices, about 500 first tokens (one
    of them, "The", in a sixth of all titles) and 2,900 tokens in all; growing with n as the
    vocabulary of a growing text does, by a power of .6.
    """
    grow = (n / 1664) ** 0.6
    first, later = int(700 * grow), int(3300 * grow)
    zipf = lambda m, a, b: (p := 1 / (np.arange(m) + b) ** a) / p.sum()
    p_first, p_later = zipf(first, 0.75, 4), zipf(later, 0.55, 20)
    p_first = np.concatenate([[0.17], 0.83 * p_first])
    name = rng.permutation(np.arange(2, vocab_size))[:first + later + 1]
    made = {}
    while len(made) < n:
        k = 1 + rng.poisson(2.6)
        t = [name[rng.choice(first + 1, p=p_first)],
             *name[1 + first + rng.choice(later, k, p=p_later)]]
        if made and rng.random() < 0.06:                   # a sequel: another title's, but the end
            t = [*rng.choice(list(made)).split(" ")[:-1], t[-1]]
        made[" ".join(map(str, t))] = None
    return list(made)


class World:
    """Catalog, histories, and a model with the adapters "sft" and "player", not yet equal."""

    def __init__(self, cfg, device, dtype, shape=None):
        gc.collect()                            # the world before, which its own hook keeps alive
        rng = np.random.default_rng(cfg.seed)
        torch.manual_seed(cfg.seed)
        tokenizer = Tokenizer(lambda text: [1 if t == "\n" else int(t) for t in
                                            text.replace("\n", " \n").split(" ")],
                              cfg.vocab_size, "numbers")
        self.catalog = Catalog(titles(cfg.n_titles, rng, cfg.vocab_size), "0 0 0 0\n", tokenizer,
                               cfg.history)
        self.catalog.trie.to(device)
        self.model = Model(shape or ModelConfig(cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_heads,
                                                cfg.n_kv_heads, cfg.dim // cfg.n_heads,
                                                cfg.ffn_dim))
        self.model.compute_dtype = dtype
        self.model.to(device).freeze()
        for name in ("sft", "player"):
            self.model.add_adapter(name, cfg.lora_rank)
            for p in self.model.adapter_parameters(name):
                torch.nn.init.normal_(p, std=0.01)
        p = 1 / (np.arange(cfg.n_titles) + 10)
        self.popular = p / p.sum()
        self.rng, self.device = rng, device
        self.computed = 0                                  # tokens that passed through our model
        self.model.register_forward_pre_hook(self._count)

    def _count(self, _, args):
        self.computed += args[0].numel()

    def histories(self, n, size):
        return [self.rng.choice(len(self.popular), size, replace=False, p=self.popular)
                for _ in range(n)]

    def tune(self, size, steps=20):
        """A few SFT steps of the player, so that a search has as much to look at as with a real
        model (25 to 50 prefixes a user on ML-100K; a random model is far too even).
        """
        self.model.use("player")
        params = self.model.adapter_parameters("player")
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        for _ in range(steps):
            our_sft(self.model, self, self.histories(2, size)).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def twin(model):
    """The same model as a transformers LlamaForCausalLM: its attention and norms are its own,
    all weights and the linear layers with their adapters are ours (so gradients land in the same
    place).
    """
    import transformers
    c = model.config
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        intermediate_size=c.ffn_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, bos_token_id=0,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=4096)).to(model.embed.device).eval()
    hf.model.embed_tokens.weight = hf.lm_head.weight = model.embed
    hf.model.norm.weight = model.norm.weight
    for theirs, ours in zip(hf.model.layers, model.blocks):
        theirs.input_layernorm.weight = ours.attn_norm.weight
        theirs.post_attention_layernorm.weight = ours.ffn_norm.weight
        for name in "qkvo":
            setattr(theirs.self_attn, f"{name}_proj", getattr(ours, name))
        for name in ("gate", "up", "down"):
            setattr(theirs.mlp, f"{name}_proj", getattr(ours, name))
    return hf


# ---------------------------------------------------------------------- the usual way

def peer_log_q(hf, catalog, rows, targets):
    """log q of (1) of each target after its row of history: a row each, every position's logits
    over the whole vocabulary. rows: N arrays of titles, targets (N,) -> (N,).
    """
    trie, mode = catalog.trie, catalog.trie.modes["trie"]
    device = trie.token.device
    docs = [catalog.document(h)[0] for h in rows]
    full = [d + catalog.tokens[i] for d, i in zip(docs, targets)]
    tokens = pad(full).to(device)
    real = torch.arange(tokens.shape[1], device=device) < torch.tensor([len(f) for f in full],
                                                                       device=device)[:, None]
    logits = hf(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits     # (N,T,V)
    u, child = mode.step_node[targets], mode.step_child[targets]                         # (N,J)
    at = torch.tensor([len(d) - 1 for d in docs], device=device)[:, None] + trie.depth[u]
    n, j = (u >= 0).nonzero(as_tuple=True)
    family = trie.children(u[n, j])
    among = logits[n, at[n, j]].float().gather(1, trie.token[family.clamp(min=0)])
    among = among.masked_fill(family < 0, selfplay.NEG)
    step = (among.gather(1, (child[n, j] - trie.first[u[n, j]])[:, None])[:, 0]
            - among.logsumexp(1))
    return step.new_zeros(len(rows)).index_add(0, n, step)


def peer_corrector(hf, world, histories, items):
    """The loss (9) of one step, S-DPO's way."""
    rows = [h for h in histories for _ in range(items.shape[1])]
    flat = items.flatten()
    with torch.no_grad():
        world.model.use("sft")
        ref = peer_log_q(hf, world.catalog, rows, flat).view(items.shape)
    world.model.use("player")
    logq = peer_log_q(hf, world.catalog, rows, flat).view(items.shape)
    return corrector.loss(judger.score(logq, ref, ref, 1.0, 1.0), logq.new_ones(len(items)))


def our_corrector(model, world, histories, items):
    prompt = world.catalog.prompts(histories, world.device)
    prompt = (prompt[0], prompt[1][:, None])
    with torch.no_grad():
        world.model.use("sft")
        ref = selfplay.log_q(model, world.catalog.trie, prompt, items[:, None])[:, 0]
    world.model.use("player")
    logq = selfplay.log_q(model, world.catalog.trie, prompt, items[:, None])[:, 0]
    return corrector.loss(judger.score(logq, ref, ref, 1.0, 1.0), logq.new_ones(len(items)))


def peer_sft(hf, world, windows):
    """The loss of one SFT step, a row for every target, in chunks of like length. The gradient is
    taken chunk by chunk, as one does to fit in memory.
    """
    rows = [(w[:t], w[t]) for w in windows for t in range(1, len(w))]
    rows.sort(key=lambda r: len(r[0]))
    total, size = 0.0, 8 if world.device.type == "cpu" else 64
    for i in range(0, len(rows), size):
        histories, targets = zip(*rows[i:i + size])
        loss = -peer_log_q(hf, world.catalog, histories, torch.tensor(np.array(targets),
            device=world.device)).sum() / len(rows)
        loss.backward()
        total += loss.detach()
    return total


def our_sft(model, world, windows):
    tokens, at, node, child, n = world.catalog.window_batch(windows, world.device)
    hidden = model(tokens).flatten(0, 1)[at]
    return -selfplay.step_log_prob(model, world.catalog.trie, hidden, node, child).sum() / n


def peer_topk(hf, world, histories, k=10, beams=20):
    """transformers' beam search over the trie -> per user (items, log q), and the beam's scores."""
    catalog, docs = world.catalog, [world.catalog.document(h)[0] for h in histories]
    P = max(map(len, docs))
    tokens = torch.tensor([[0] * (P - len(d)) + d for d in docs], device=world.device)
    mask = torch.tensor([[0] * (P - len(d)) + [1] * len(d) for d in docs], device=world.device)
    # after a whole title only padding may follow
    allowed = lambda _, ids: world.allowed.get(tuple(ids[P:].tolist()), [0])
    out = hf.generate(input_ids=tokens, attention_mask=mask, num_beams=beams, do_sample=False,
                      num_return_sequences=k, max_new_tokens=int(catalog.lengths.max()),
                      length_penalty=0.0, renormalize_logits=True, return_dict_in_generate=True,
                      output_scores=True, prefix_allowed_tokens_fn=allowed)
    name = {tuple(t): i for i, t in enumerate(catalog.tokens)}
    found = [name[tuple(row[:row.index(1) + 1])] for row in out.sequences[:, P:].tolist()]
    return np.array(found).reshape(len(docs), k), out.sequences_scores.view(len(docs), k)


def allowed_tokens(catalog):
    """prefix of a title -> tokens that may follow it in some title."""
    allowed = {}
    for t in catalog.tokens:
        for j in range(len(t)):
            allowed.setdefault(tuple(t[:j]), set()).add(t[j])
    return {k: sorted(v) for k, v in allowed.items()}


@torch.no_grad()
def our_topk(model, world, histories, k=10, width=8):
    search = selfplay.Search(model, world.catalog.trie,
                             world.catalog.prompts(histories, world.device))
    seen = torch.zeros(len(histories), len(world.catalog.tokens), dtype=torch.bool,
                       device=world.device)
    return search.top_k(k, seen, width)


# ---------------------------------------------------------------------- agree, then run in turns

def gradient(world, compute):
    """compute() -> (loss, the player's gradient as one vector)."""
    world.model.zero_grad()
    loss = compute()
    if loss.requires_grad:
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in
                                   world.model.adapter_parameters(world.model.blocks[0].q.active)])


def agree(world, what, ours, theirs, tolerance):
    """Both sides' loss and gradient within `tolerance` of each other, or stop. -> tokens that ours
    computed.
    """
    before = world.computed
    (a, g), computed = gradient(world, ours), world.computed - before
    b, h = gradient(world, theirs)
    apart = float((g - h).norm() / h.norm())
    if not abs(a - b) <= tolerance * max(1, abs(b)) or not apart <= 5 * tolerance:
        raise SystemExit(f"{what}: the sides differ: loss {a} and {b}, gradients by {apart:.1e}")
    print(f"{what}: the sides agree: loss {a:.5f} and {b:.5f}, gradients within {apart:.0e}")
    return computed


def agree_topk(world, hf, histories, tolerance):
    before = world.computed
    items, value, prefixes = our_topk(world.model, world, histories)
    computed = world.computed - before
    catalog_items, catalog_value, _ = our_topk(world.model, world, histories, width=0)
    found, scores = peer_topk(hf, world, histories)
    with torch.no_grad():
        exact = selfplay.Search(world.model, world.catalog.trie, world.catalog.prompts(
            histories, world.device)).score(torch.tensor(found, device=world.device))
    apart = float((exact - scores).abs().max())
    best = (scores[:, -1] <= value[:, -1] + tolerance).all()
    same = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(items.tolist(), found.tolist())])
    one_pass = (value - catalog_value).abs().max()
    if not (apart <= tolerance and best and one_pass <= tolerance):
        raise SystemExit(f"topk: the sides differ by {apart:.1e} nats, ours is "
                         f"{'' if best else 'not '}the best, by {one_pass:.1e} from one pass")
    print(f"topk: the sides agree: log q within {apart:.0e} nats; {same:.1%} of the beam's titles "
          f"are in the exact lists; {float(prefixes.float().mean()):.0f} prefixes a user")
    return computed, float(prefixes.float().mean())


def compare(cfg, device, dtype):
    """(a), (b), (c) -> the figures."""
    world, peak = World(cfg, device, dtype), matmul_peak(device, dtype)
    world.allowed = allowed_tokens(world.catalog)
    model, hf = world.model, twin(world.model)
    on_cpu, tolerance = device.type == "cpu", 1e-4 if dtype == torch.float32 else 3e-2
    B = cfg.batch or (1 if on_cpu else 16)
    if cfg.compile == "True":
        model.compile_blocks()
        for layer in hf.model.layers:
            layer.compile(dynamic=True)
    results = {}

    def report(name, what, ours, theirs, flops, unit, n):
        ratio = float(np.median(np.array(theirs) / np.array(ours)))
        a, b = float(np.median(ours)), float(np.median(theirs))
        results[name] = {"ours_s": a, "peer_s": b, "ratio": ratio, "share_of_limit": flops / a
                         / peak, f"{unit}_per_s": n / a}
        print(f"{what:<44} ours {a:8.3f} s, peer {b:8.3f} s, ratio {ratio:5.1f}x; "
              f"{n / a:8.1f} {unit}/s, {flops / a / peak:.0%} of the limit", flush=True)

    V, mean = len(world.catalog.trie.vocab), world.catalog.lengths.mean()
    context = cfg.history * mean
    for S in (4, 16):
        histories = world.histories(B, cfg.history)
        items = torch.tensor(np.stack(world.histories(B, 1 + S)), device=device)
        step = lambda side, m: lambda: side(m, world, histories, items).backward()
        n = agree(world, f"corrector, S = {S}", lambda: our_corrector(model, world, histories,
            items), lambda: peer_corrector(hf, world, histories, items), tolerance)
        flops = (model.flops(n // 2, context / 2) + model.flops(n // 2, context / 2, train=False))
        report("corrector" if S == 4 else f"corrector_S{S}", f"(a) corrector, {B} histories, S = "
               f"{S}", *in_turns(device, cfg.repeats, step(our_corrector, model),
                                 step(peer_corrector, hf)), flops, "histories", B)
    windows = world.histories(B, cfg.history + 1)
    n = agree(world, "sft", lambda: our_sft(model, world, windows),
              lambda: peer_sft(hf, world, windows), tolerance)
    report("sft", f"(b) SFT, {B} windows of {cfg.history + 1} titles", *in_turns(
        device, cfg.repeats, lambda: our_sft(model, world, windows).backward(),
        lambda: peer_sft(hf, world, windows)),
        model.flops(n, context / 2, B * cfg.history * 2 * V), "targets", B * cfg.history)
    users = world.histories(cfg.users or (4 if on_cpu else 64), cfg.history)
    world.tune(cfg.history + 1)
    hf = twin(model)                                       # not compiled: a cache grows
    n, prefixes = agree_topk(world, hf, users, tolerance * 10)
    ours, theirs, one_pass = in_turns(device, cfg.repeats, lambda: our_topk(model, world, users),
                                      lambda: peer_topk(hf, world, users),
                                      lambda: our_topk(model, world, users, width=0))
    report("topk", f"(c) top 10, {len(users)} users, best first", ours, theirs,
           model.flops(n, context, train=False), "users", len(users))
    results["topk"] |= {"prefixes_per_user": prefixes, "one_pass_s": float(np.median(one_pass))}
    print(f"{'    the whole catalog in one pass':<44} ours {np.median(one_pass):8.3f} s")
    return results


def sweep(cfg, device, dtype):
    """Our side alone: seconds of a corrector step with its opponent's pass, and of the top 10, as
    one size grows.
    """
    B, rows = cfg.batch or (1 if device.type == "cpu" else 16), []
    settings = [dict(n_titles=n) for n in (1000, 4000, 16000)]
    settings += [dict(history=h) for h in (5, 10, 20, 40, 80)] + [dict(S=s) for s in (1, 4, 16, 64)]
    print(f"{'catalog':>8} {'history':>8} {'S':>4} | {'corrector s':>12} {'tokens':>7} | "
          f"{'top 10 s/user':>13} {'prefixes':>9}")
    for setting in settings:
        S = setting.pop("S", 16)
        c = dataclasses.replace(cfg, **setting)
        world = World(c, device, dtype)
        histories = world.histories(B, c.history)
        items = torch.tensor(np.stack(world.histories(B, 1 + S)), device=device)
        before = world.computed
        corrected, = in_turns(device, c.repeats, lambda: our_corrector(world.model, world,
            histories, items).backward())
        tokens = (world.computed - before) // (2 * (c.repeats + 1) * B)
        world.tune(min(c.history, 20) + 1)
        prefixes = our_topk(world.model, world, histories)[2].float().mean()
        listed, = in_turns(device, c.repeats, lambda: our_topk(world.model, world, histories))
        rows.append({"n_titles": c.n_titles, "history": c.history, "S": S,
                     "corrector_s": float(np.median(corrected)), "tokens_per_history": tokens,
                     "topk_s_per_user": float(np.median(listed)) / B,
                     "prefixes_per_user": float(prefixes)})
        print(f"{c.n_titles:>8} {c.history:>8} {S:>4} | {np.median(corrected):12.3f} {tokens:7d} | "
              f"{np.median(listed) / B:13.4f} {float(prefixes):9.1f}", flush=True)
    return {"sweep": rows, "batch": B}


def without_weights(name):
    """One of BASES as a Model on the meta device."""
    L, dim, heads, kv_heads, width, inner, vocab, tied = BASES[name]
    with torch.device("meta"):
        return Model(ModelConfig(vocab, dim, L, heads, kv_heads, width, inner, tied=tied,
                                 qkv_bias="Qwen" in name))


def saved_bytes(model, forward):
    """Bytes that autograd keeps of a forward pass for its backward pass, parameters left out."""
    ours, held = {p.data_ptr() for p in model.parameters()}, {}

    def pack(x):
        x = x.detach()          # or the graph would hold itself, for good
        held[x.untyped_storage().data_ptr()] = x        # held, or its address would be used again
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in ours)


def memory(cfg, device, dtype, branches=8, S=16, eval_batch=64):
    """GiB that training takes, computed: weights in `dtype`; 20 bytes an adapter weight (value,
    gradient and AdamW's two moments in float32, and the frozen SFT adapter's value); and what
    autograd keeps of a step of cfg.batch windows (0: 16), counted on the base's shape with one
    block and with two, whose difference is a block. With --recompute it keeps every block's input,
    and one block at a time. Search keeps `eval_batch` users' keys and values instead, in buffers
    with half as much room again (`model.KV`).
    """
    B, size, rows = cfg.batch or 16, torch.finfo(dtype).bits // 8, []
    # one catalog for all: of token numbers that every base has
    cfg = dataclasses.replace(cfg, vocab_size=min(shape[6] for shape in BASES.values()))

    def count(shape):
        """{step: (bytes kept, tokens)} for a model of this shape."""
        world = World(cfg, device, dtype, shape)
        model, catalog, found = world.model.use("player"), world.catalog, {}
        drawn = world.histories(B, cfg.history + 1)
        prompt = catalog.branches(drawn, draw_places(drawn, branches, world.rng), device)
        items = torch.as_tensor(world.rng.choice(cfg.n_titles, (B, branches, 1 + S),
                                                 p=world.popular), device=device)
        for step, forward in {"sft": lambda: our_sft(model, world, drawn), "corrector":
                              lambda: selfplay.log_q(model, catalog.trie, prompt, items)}.items():
            world.computed = 0
            found[step] = saved_bytes(model, forward), world.computed
        return found
    for name in BASES:
        base = without_weights(name)
        c, weights = base.config, sum(p.numel() for p in base.parameters())
        base.add_adapter("sft", cfg.lora_rank)
        row = {"base": name, "weights": size * weights,
               "adapters": 20 * sum(p.numel() for p in base.adapter_parameters("sft"))}
        one, two = (count(dataclasses.replace(c, n_layers=n)) for n in (1, 2))
        for step, (bytes_kept, tokens) in one.items():
            row |= {f"{step} tokens": tokens,
                    step: bytes_kept + (c.n_layers - 1) * (two[step][0] - bytes_kept),
                    f"{step}, recompute": bytes_kept + c.n_layers * tokens * c.dim * size}
        room = row["sft tokens"] // B * 3 // 2 + 32
        row["search"] = 2 * size * eval_batch * room * c.n_layers * c.n_kv_heads * c.head_dim
        if not rows:
            print(f"{B} windows of {cfg.history + 1} titles: SFT {row['sft tokens']} tokens, "
                  f"corrector ({branches} places, S = {S}) {row['corrector tokens']}; GiB beside "
                  f"weights and adapters, re: with --recompute\n{'':>27} {'weights':>8} "
                  f"{'adapters':>8} {'SFT':>6} {'re':>6} {'corrector':>9} {'re':>6} {'search':>6}")
        gib = {k: v / 2 ** 30 for k, v in row.items() if k != "base" and "tokens" not in k}
        rows.append(row | gib)
        print(f"{name:>27} {gib['weights']:8.2f} {gib['adapters']:8.2f} {gib['sft']:6.1f} "
              f"{gib['sft, recompute']:6.1f} {gib['corrector']:9.1f} "
              f"{gib['corrector, recompute']:6.1f} {gib['search']:6.1f}", flush=True)
    return {"memory": rows}


def main(cfg):
    device, dtype = choose_device(cfg)
    t0 = time.time()
    work = sweep if cfg.sweep else memory if cfg.memory else compare
    results = work(cfg, device, dtype)
    card = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()}, {torch.get_num_threads()} threads")
    results["hardware"] = {"device": card, "dtype": str(dtype)[6:], "torch": torch.__version__,
                           "matmul_flops_per_s": matmul_peak(device, dtype),
                           "peak_memory_gib": peak_memory(device)}
    print(f"{(time.time() - t0) / 60:.1f} minutes; {card}, {str(dtype)[6:]}, at most "
          f"{peak_memory(device):.1f} GiB")
    if cfg.out:
        with open(cfg.out, "w") as f:
            json.dump(results | {"config": dataclasses.asdict(cfg)}, f, indent=1)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(check(parse(sys.argv[1:], Bench), Bench))))
