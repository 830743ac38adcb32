"""The tests: every fast path against a slow, obvious twin, every formula against a case worked by
hand.

    python -m pytest -q
"""

import copy
import functools
import gc
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # as train.py does, and why

import numpy as np
import pytest
import torch
import transformers

import bench
import corrector
import data
import grid
import judger
import machine
import metrics
import recommend
import report
import selfplay
import train
from catalog import (Catalog, Trie, draw_places, model_tokenizer, tiktoken_from, training_batches,
                     word_tokenizer)
from config import METHODS, exit_code, parse
from model import Model, ModelConfig, from_hf
from results import trials

torch.set_num_threads(2)
toy_world = functools.cache(data.toy_world)     # made once for all tests: two seconds each
data.toy_world = lambda *args, **options: copy.copy(toy_world(*args, **options))


# ---------------------------------------------------------------------- small worlds

def random_model(vocab, seed=0, **kw):
    """A tiny model with weights large enough for its predictions to differ."""
    torch.manual_seed(seed)
    model = Model(ModelConfig(vocab, **(dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                                             head_dim=8, ffn_dim=64) | kw)))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def toy():
    """A toy world with its catalog and a random model: ds, catalog, model."""
    ds = data.load_dataset("toy", max_users=40)
    lines = [t + "\n" for t in ds.titles]
    tok = word_tokenizer(lines + [ds.header]).compact(lines + [ds.header])
    return ds, Catalog(ds.titles, ds.header, tok, history=12), random_model(tok.vocab_size)


def log_q_one_by_one(model, catalog, history_tokens, item, over="trie", tau=1.0):
    """The twin of every scoring path: the whole prompt again for every token of one title."""
    trie, ids, node, total = catalog.trie, list(history_tokens), 0, 0.0
    for t in catalog.tokens[item]:
        logits = model.logits(model(torch.tensor([ids])))[0, -1] / tau
        children = torch.arange(trie.first[node], trie.first[node + 1])
        norm = logits.logsumexp(0) if over == "vocab" else logits[trie.token[children]].logsumexp(0)
        total = total + logits[t] - norm
        node, ids = int(children[trie.token[children] == t]), ids + [t]
    return total


# ---------------------------------------------------------------------- model.py

def hf_pair(kind, **kw):
    common = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                  num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512) | kw
    torch.manual_seed(1)
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **common)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)                          # biases and norms too
    return hf, from_hf(hf).eval()


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("kind, kw", [("llama", dict(tie_word_embeddings=False)),
                                      ("llama", dict(tie_word_embeddings=True,
                                                     rope_parameters=LLAMA3_ROPE)),
                                      ("qwen2", dict(tie_word_embeddings=True))])
@torch.no_grad()
def test_logits_equal_transformers(kind, kw):
    hf, ours = hf_pair(kind, **kw)
    x = torch.randint(97, (2, 40))
    want = hf(x).logits
    assert (ours.logits(ours(x)) - want).abs().max() < 1e-4, "full"
    cache = []
    first = ours(x[:, :25], cache=cache)
    mask = torch.ones(15, 40, dtype=torch.bool).tril(25).expand(2, -1, -1)
    second = ours(x[:, 25:], mask=mask, cache=cache)
    assert (ours.logits(torch.cat([first, second], 1)) - want).abs().max() < 1e-4, "cached"
    # masked: two continuations of one prefix in one row equal two rows
    prefix, a, b = x[:1, :10], x[:1, 10:14], x[:1, 14:18]
    row = torch.cat([prefix, a, b], 1)
    positions = torch.cat([torch.arange(14), torch.arange(10, 14)])[None]
    mask = torch.ones(18, 18, dtype=torch.bool).tril()
    mask[14:, 10:14] = False
    got = ours.logits(ours(row, positions, mask[None]))
    assert (got[:, :14] - hf(torch.cat([prefix, a], 1)).logits).abs().max() < 1e-4
    assert (got[:, 14:] - hf(torch.cat([prefix, b], 1)).logits[:, 10:]).abs().max() < 1e-4


def test_unsupported_architecture_is_named():
    with pytest.raises(ValueError, match="gpt2"):
        from_hf(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8,
            n_layer=1, n_head=2)))


def test_lora_starts_as_base_switches_and_alone_gets_gradients():
    model, x = random_model(50), torch.randint(50, (2, 9))
    base = model(x)
    model.freeze()
    model.add_adapter("a", 4)
    model.add_adapter("b", 4)
    assert torch.equal(model.use("a")(x), base)
    for p in model.adapter_parameters("a"):
        torch.nn.init.normal_(p, std=0.2)
    changed = model(x)
    assert not torch.allclose(changed, base)
    assert torch.equal(model.use("b")(x), base) and torch.equal(model.use(None)(x),
        base) and torch.equal(model.use("a")(x), changed)
    changed.sum().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got and all(".lora_" in n and n.endswith(".a") for n in got)
    model.add_adapter("c", 4, like="a")
    assert torch.equal(model.use("c")(x), changed)
    # by the formula, on one layer
    layer = model.blocks[0].q
    h = torch.randn(3, 32)
    layer.active = "a"
    want = h @ (layer.weight + layer.scale * layer.lora_b["a"] @ layer.lora_a["a"]).T
    assert torch.allclose(layer(h), want, atol=1e-5)
    with pytest.raises(KeyError):
        model.use("nobody")


def test_mixed_precision_keeps_adapters_in_float32():
    model = random_model(50)
    x = torch.randint(50, (2, 9))
    want = model(x)
    model.compute_dtype = torch.bfloat16
    model.freeze()
    model.add_adapter("a", 4)
    y = model.use("a")(x)
    assert y.dtype == model.blocks[0].q.weight.dtype == torch.bfloat16
    assert model.rope.dtype == torch.float32
    assert (y.float() - want).abs().mean() < 0.05 * want.abs().mean()
    model.logits(y).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter_parameters("a"))
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)
               for p in model.adapter_parameters("a"))


def test_compiled_blocks_are_a_handful_of_graphs_and_change_nothing():
    """Three layers, two adapters, training and not, with and without a mask, at many lengths."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = random_model(50, n_layers=3).freeze()
    for name in ("sft", "player"):
        model.add_adapter(name, 4)
        for p in model.adapter_parameters(name):
            torch.nn.init.normal_(p, std=0.2)

    def passes():
        out = []
        for T in (9, 12, 17, 23):
            x = torch.arange(3 * T).view(3, T) % 50
            mask = torch.ones(3, T, T, dtype=torch.bool).tril()
            for name, args in (("sft", (x,)), ("player", (x, torch.arange(T).expand(3, T), mask))):
                hidden = model.use(name).train(name == "sft")(*args)
                out += [hidden, *torch.autograd.grad(hidden.sum(), model.adapter_parameters(name))]
        return out

    want = passes()
    model.compile_blocks(backend="aot_eager")
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(passes(), want, strict=True))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_flops_against_a_count_by_torch():
    from torch.utils.flop_counter import FlopCounterMode
    model, x = random_model(50).freeze(), torch.randint(50, (2, 30))
    model.add_adapter("a", 4)
    model.use("a")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.logits(model(x))
    with FlopCounterMode(display=False) as both:
        model.logits(model(x)).sum().backward()
    # torch does not count attention on a CPU
    for trained, counted in ((False, forward), (True, both)):
        assert model.flops(60, 0, 60 * 50, trained) == counted.get_total_flops()
    attention = model.flops(60, 30, train=False) - model.flops(60, 0, train=False)
    assert attention == 2 * 4 * 30 * 60 * 32


# ---------------------------------------------------------------------- the tokenizer

def bpe_tokenizer(pre):
    """A byte-level BPE trained on the spot, as transformers wraps it, special tokens first (as in
    SmolLM2).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    corpus = ["The Ice Storm (1997)\n", "Toy Story\n", "Léon: The Professional\n",
              "101 Dalmatians isn't here\n", "Heat 1995  12\n"] * 20
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=t)


def pre_tokenizer_kinds():
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as p
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return {"gpt2": p.ByteLevel(add_prefix_space=False),
            "smollm2": p.Sequence([p.Digits(individual_digits=True),
                                   p.ByteLevel(add_prefix_space=False)]),
            "llama3": p.Sequence([p.Split(Regex(llama3), "isolated"),
                                  p.ByteLevel(add_prefix_space=False, use_regex=False)])}


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3"])
def test_tiktoken_equals_the_original(kind):
    hf = bpe_tokenizer(pre_tokenizer_kinds()[kind])
    enc, ids = tiktoken_from(hf)
    texts = ["The Ice Storm\n", "Toy Story 2 (1999)\n", "Léon!\n", "2001: A Space Odyssey\n",
             "  two  spaces 12  345 \n", "it's We'LL 'til\n", "Amélie…日本\n"]
    for t in texts:
        assert ids[enc.encode_ordinary(t)].tolist() == hf.encode(t, add_special_tokens=False), t


def test_another_kind_of_tokenizer_uses_its_own(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({"Heat": 0, "?": 1}, unk_token="?"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=t).save_pretrained(tmp_path)
    tok = model_tokenizer(tmp_path, None, ["Heat\n"])
    assert tok.encode("Heat Heat") == [0, 0] and "own tokenizer" in capsys.readouterr().out


# ---------------------------------------------------------------------- the trie and q

def test_trie_by_hand():
    seqs = [[5, 6, 9], [5, 7, 9], [8, 9], [5, 6, 6, 9]]
    trie = Trie(seqs)
    assert trie.n_nodes == 1 + 2 + 3 + 3 + 1 and trie.vocab.tolist() == [5, 6, 7, 8, 9]
    parent = {int(c): v for v in range(trie.n_nodes)
              for c in trie.children(torch.tensor([v]))[0] if c >= 0} | {0: -1}
    for i, s in enumerate(seqs):
        nodes = [int(trie.leaf[i])]
        while parent[nodes[0]]:
            nodes.insert(0, parent[nodes[0]])
        assert trie.token[nodes].tolist() == s and trie.item[nodes[-1]] == i
        assert trie.depth[nodes].tolist() == list(range(1, len(s) + 1))
    assert sorted(trie.token[trie.children(torch.tensor([0]))[0]].tolist()) == [5, 8]
    steps = (trie.modes["trie"].step_node >= 0).sum(1).tolist()
    assert steps == [3, 2, 1, 3] and (trie.modes["vocab"].step_node >= 0).sum(1).tolist() == [3, 3,
        2, 4]
    # ancestors by the interval test and by walking up
    for u in range(trie.n_nodes):
        for v in range(trie.n_nodes):
            w = v
            while w not in (u, -1):
                w = parent[w]
            assert bool(trie.enter[u] <= trie.enter[v] < trie.leave[u]) == (w == u)


def test_trie_refuses_what_it_cannot_tell_apart():
    with pytest.raises(data.InputError, match="same tokens"):
        Trie([[1, 2], [1, 2]])
    with pytest.raises(data.InputError, match="beginning"):
        Trie([[1, 2], [1, 2, 3]])


def test_title_that_begins_another():
    """'Heat' and 'Heat Wave': the newline at the end tells them apart, and q still sums to one."""
    titles, header = ["Heat", "Heat Wave", "Up"], "Seen:\n"
    texts = [t + "\n" for t in titles] + [header]
    tok = word_tokenizer(texts).compact(texts)
    catalog, model = Catalog(titles, header, tok, 5), random_model(tok.vocab_size)
    search = selfplay.Search(model, catalog.trie, catalog.prompts([[2]]))
    q = search.score(torch.arange(3)[None]).exp()
    assert torch.allclose(q.sum(), torch.tensor(1.0), atol=1e-5) and (q > 0).all()
    want = log_q_one_by_one(model, catalog, catalog.document([2])[0], 1)
    assert torch.allclose(q[0, 1].log(), want, atol=1e-5)


@torch.no_grad()
def test_q_sums_to_one_and_vocabulary_softmax_to_less(toy):
    ds, catalog, model = toy
    prompt = catalog.prompts([ds.train(u) for u in range(3)])
    everything = torch.arange(len(ds.titles)).expand(3, -1)
    q = selfplay.Search(model, catalog.trie, prompt).score(everything).exp().sum(1)
    assert torch.allclose(q, torch.ones(3), atol=1e-5)
    assert (selfplay.Search(model, catalog.trie, prompt,
                            "vocab").score(everything).exp().sum(1) < 0.9).all()


@pytest.mark.parametrize("over", ["trie", "vocab"])
def test_branches_equal_one_by_one(toy, over):
    """log q of items branched off several places of one window: packed, searched, and one by one;
    and the gradients.
    """
    ds, catalog, model = toy
    rng = np.random.default_rng(0)
    windows = [ds.train(u)[:9] for u in range(2)]
    places = draw_places(windows, 2, rng)
    items = torch.randint(len(ds.titles), (2, 2, 5))
    items[..., 1] = items[..., 0]                                      # the same item twice
    packed = selfplay.log_q(model, catalog.trie, catalog.branches(windows, places, multiple=16),
                            items, over)
    with torch.no_grad():
        searched = selfplay.Search(model, catalog.trie, catalog.branches(windows, places),
                                   over).score(items.view(4, 5))
    single = torch.stack([log_q_one_by_one(model, catalog, catalog.document(w[:p])[0], i, over)
                          for w, ps, row in zip(windows, places, items) for p, its in zip(ps, row)
                          for i in its]).view(2, 2, 5)
    assert torch.allclose(packed, single, atol=1e-4) and torch.allclose(searched.view(2, 2, 5),
        single, atol=1e-4)
    weight = torch.randn(2, 2, 5)
    params = [p for n, p in model.named_parameters()]
    for a, b in zip(torch.autograd.grad((packed * weight).sum(), params),
                    torch.autograd.grad((single * weight).sum(), params)):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max() + 1e-6)


def test_sft_targets_equal_one_by_one(toy):
    """Every title of a window in one pass, against a prompt a title."""
    ds, catalog, model = toy
    windows = [ds.train(0)[:6], ds.train(1)[:4]]
    tokens, at, node, child, n = catalog.window_batch(windows, multiple=8)
    got = selfplay.step_log_prob(model, catalog.trie, model(tokens).flatten(0, 1)[at], node,
                                 child).sum()
    want = sum(log_q_one_by_one(model, catalog, catalog.document(w[:p])[0], w[p]) for w in windows
               for p in range(1, len(w)))
    assert n == 5 + 3 and torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("tau", [1.0, 1.5])
@torch.no_grad()
def test_sampling_frequencies(tau):
    titles, header = ["Red Sun", "Red Moon", "Blue Sun", "Green", "Red Sun Down"], "Seen:\n"
    texts = [t + "\n" for t in titles] + [header]
    tok = word_tokenizer(texts).compact(texts)
    catalog, model = Catalog(titles, header, tok, 5), random_model(tok.vocab_size, seed=3)
    trie, prompt = catalog.trie, catalog.prompts([[3, 0]])
    n = 20000
    got = torch.bincount(selfplay.Search(model, trie, prompt).sample(n, tau,
        torch.Generator().manual_seed(0))[0], minlength=5) / n
    want = torch.stack([log_q_one_by_one(model, catalog, catalog.document([3, 0])[0], i, tau=tau)
                        for i in range(5)]).exp()           # tempered at every decision
    assert (got - want).abs().max() < 4 * math.sqrt(0.25 / n)
    assert abs(float(want.sum()) - 1) < 1e-5


@pytest.mark.parametrize("over", ["trie", "vocab"])
@torch.no_grad()
def test_top_k_equals_brute_force(toy, over):
    ds, catalog, model = toy
    prompt = catalog.prompts([ds.train(u) for u in range(8)])
    score = selfplay.Search(model, catalog.trie, prompt,
                            over).score(torch.arange(len(ds.titles)).expand(8, -1))
    seen = torch.zeros(8, len(ds.titles), dtype=torch.bool)
    for u in range(8):
        seen[u, ds.train(u)] = True
        # the best ones too, so that leaving out matters
        seen[u, score[u].topk(3).indices] = True
    want = score.masked_fill(seen, -torch.inf).topk(10)
    everything = catalog.trie.modes[over].decision.sum()
    for width in (1, 8, 0):
        search = selfplay.Search(model, catalog.trie, prompt, over)
        items, value, run = search.top_k(10, seen, width)
        assert torch.equal(items, want.indices) and torch.allclose(value, want.values, atol=1e-4)
        assert not seen.gather(1, items).any()
        assert (run < everything).all() if width else (run == everything).all()
    search.keep(torch.arange(8) < 5)                    # as top_k does with those that are finished
    with pytest.raises(ValueError, match="their own Search"):
        search.score(items)
    few = torch.ones_like(seen)
    few[:, :4] = False                                                 # only four items are left
    items, value, _ = selfplay.Search(model, catalog.trie, prompt, over).top_k(10, few)
    assert (items[:, :4].sort(1).values == torch.arange(4)).all() and (items[:, 4:] == -1).all()


@torch.no_grad()
def test_play_scores_what_it_samples(toy):
    ds, catalog, model = toy
    windows = [ds.train(u)[:8] for u in range(5)]
    places = draw_places(windows, 3, np.random.default_rng(0))
    other = random_model(model.config.vocab_size, seed=9)
    policies = lambda name: {"player": model, "sft": other}[name]
    items, logq_t, logq_sft = selfplay.play(policies, catalog, windows, places, 4, 1.25, 2,
                                            alpha=0.5)
    assert items.shape == logq_t.shape == logq_sft.shape == (5, 3, 5)
    assert (items[..., 0].numpy() == np.stack([w[p] for w, p in zip(windows, places)])).all()
    prompt = catalog.branches(windows, places)
    assert torch.allclose(logq_t, selfplay.log_q(model, catalog.trie, prompt, items), atol=1e-4)
    assert torch.allclose(logq_sft, selfplay.log_q(other, catalog.trie, prompt, items), atol=1e-4)


# ---------------------------------------------------------------------- metrics.py

A2 = np.array([[1, 0], [0, 1], [.5, .5], [1, 0]])


def test_exposure_and_unfairness_by_hand():
    lists, histories = np.array([[0, 2], [3, -1]]), [[1], [1, 0, 2]]
    e = metrics.exposure(*metrics.group_sums(A2, lists))
    star = metrics.exposure(*metrics.group_sums(A2, histories))
    assert np.allclose(e, [2.5 / 3, 0.5 / 3]) and np.allclose(star, [1.5 / 4, 2.5 / 4])
    gu = e - star
    assert np.isclose(metrics.mgu(gu), 11 / 24) and np.isclose(metrics.dgu(gu), 22 / 24)
    weighted = metrics.exposure(*metrics.group_sums(A2, lists), np.array([[1., 2.], [0., 1.]]))
    assert np.allclose(weighted, [[3.5 / 4, 0.5 / 4], [1, 0]])


def test_accuracy_and_diversity_by_hand():
    lists, targets = np.array([[3, 1, 2], [0, 1, 2], [2, 0, 3]]), np.array([1, 3, 2])
    assert metrics.hits(lists, targets).tolist() == [1, 0, 1]
    assert np.allclose(metrics.ndcg(lists, targets), [1 / np.log2(3), 0, 1])
    assert metrics.coverage(lists, 8) == 0.5 and metrics.div_ratio(lists) == 4 / 9
    assert np.isclose(metrics.or_ratio(lists, 1),
                      3 / 9) and metrics.or_ratio(np.array([[0, 1, -1]]), 1) == 0.5


def test_report_intervals_cover_and_floor_is_what_noise_gives():
    rng = np.random.default_rng(0)
    credit, n = np.eye(4)[np.arange(40) % 4], 400
    # fair: uniform lists, uniform histories
    lists = np.stack([rng.choice(40, 5, replace=False) for _ in range(n)])
    histories = [rng.choice(40, 8, replace=False) for _ in range(n)]
    r = metrics.report(credit, np.arange(n), histories, lists, rng.integers(40, size=n), np.ones(n))
    assert 0.3 * r["MGU_floor"] < r["MGU@5"] < 3 * r["MGU_floor"]
    assert r["ci"]["HR@5"][0] < 5 / 40 < r["ci"]["HR@5"][1]
    half = r["ci"]["HR@5"][1] - r["ci"]["HR@5"][0]
    assert abs(half - 2 * 1.96 * math.sqrt(.125 * .875 / n)) < 0.015


def test_intervals_of_a_small_mgu_hold_their_point():
    """A plain percentile interval of a mean of |.| lies above its point where lists are fair."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        credit, n = np.eye(8)[np.arange(40) % 8], 200
        lists = np.stack([rng.choice(40, 5, replace=False) for _ in range(n)])
        histories = [rng.choice(40, 8, replace=False) for _ in range(n)]
        r = metrics.report(credit, np.arange(n), histories, lists, rng.integers(40, size=n),
                           np.ones(n), n_boot=300)
        for name in ("MGU@5", "DGU@5"):
            assert 0 <= r["ci"][name][0] <= r[name] <= r["ci"][name][1]


def test_bootstrap_draws_users_not_cases():
    w = metrics.bootstrap_weights(np.array([0, 0, 1, 2]), 200, np.random.default_rng(0))
    assert (w[:, 0] == w[:, 1]).all() and (w[:, [0, 2, 3]].sum(1) == 3).all()


# ---------------------------------------------------------------------- judger.py

def test_origins_of_planted_exposures():
    star, pre, sft = np.array([.25, .25, .5]), np.array([.35, .25, .4]), np.array([.45, .25, .3])
    o = judger.origins(star, pre, sft)
    assert np.allclose(o["b"], [.1, 0, -.1]) and np.allclose(o["shift"], [.1, 0, -.1])
    assert np.allclose(o["b"] + o["shift"], sft - star)
    assert np.isclose(o["covariance"], .02 / 3) and np.isclose(o["correlation"], 1)
    assert judger.origins(star, pre, np.array([.25, .25, .5]))["correlation"] < -.99


def test_debiased_covariance_is_unbiased_where_pretraining_is_noise():
    """E_pre, E_sft and E* have the same true value, every list is noise: the truth is 0; the plain
    estimate is not.
    """
    rng, G, K, U = np.random.default_rng(0), 6, 10, 60
    noise = lambda: (rng.multinomial(K, np.full(G, 1 / G), U).astype(float), np.full(U, float(K)))
    plain, fair, covered = [], [], 0
    for trial in range(60):
        star, pre, sft = noise(), noise(), noise()
        plain.append(judger.origins(*(metrics.exposure(*x) for x in (star, pre,
            sft)))["covariance"])
        point, (low, high) = judger.covariance_debiased(star, pre, sft, np.arange(U), n_split=100,
                                                        seed=trial)
        fair.append(point)
        covered += low < 0 < high
    error = lambda x: abs(np.mean(x)) / (np.std(x) / math.sqrt(len(x)))
    assert error(plain) > 8 and np.mean(plain) < 0 and error(fair) < 3 and covered >= 50


def test_debiased_covariance_finds_what_is_planted():
    rng, U = np.random.default_rng(0), 400
    draw = lambda p: (rng.multinomial(10, p, U).astype(float), np.full(U, 10.))
    star, pre, sft = np.array([.25, .25, .25, .25]), np.array([.3, .27, .23, .2]), np.array([.4, .3,
        .2, .1])
    point, (low, high) = judger.covariance_debiased(draw(star), draw(pre), draw(sft), np.arange(U))
    truth = judger.origins(star, pre, sft)["covariance"]
    assert low < truth < high and low > 0 and abs(point - truth) < 0.5 * truth


def test_controller_turns_the_right_way_and_stops():
    star = np.array([.5, .3, .2])
    log_v = judger.control(np.zeros(3), star, np.array([.7, .3, .0]), gamma=.4)
    assert log_v[0] < 0 and abs(log_v[1]) < 1e-9 and log_v[2] > 0
    assert np.allclose(judger.control(log_v, star, star, .4), log_v)
    for _ in range(50):
        log_v = judger.control(log_v, star, np.array([1., 0, 0]), gamma=.4)
    assert np.isclose(log_v, [-np.log(10), np.log(10), np.log(10)]).all()
    a, b = judger.verdict_parts(star, np.array([.2, .2, .6]), np.array([.7, .3, 0]))
    assert np.allclose(.4 * (a + b), judger.control(np.zeros(3), star, np.array([.7, .3, 0]), .4))
    assert np.allclose(judger.item_weights(A2, np.log([2., 8.])), [2, 8, 4, 2])


def test_judger_score_and_accuracy():
    f = judger.score(torch.tensor([[-1., -2.]]), torch.tensor([[-3., -3.]]),
                     torch.tensor([[-1., -5.]]), 2.0, 0.75)
    assert torch.allclose(f, torch.tensor([[2 * (-1 + 2.25 + .25), 2 * (-2 + 2.25 + 1.25)]]))
    assert judger.accuracy(torch.tensor([[1., 0., 2.], [1., 1., 0.]])) == pytest.approx((1 + 0 + .5
        + 1) / 4)


# ---------------------------------------------------------------------- corrector.py

def test_loss_is_spins_with_one_negative():
    f = torch.randn(7, 2)
    assert torch.allclose(corrector.loss(f, torch.ones(7)), -torch.nn.functional.logsigmoid(f[:, 0]
        - f[:, 1]).mean())
    assert torch.allclose(corrector.loss(torch.zeros(3, 17), torch.ones(3)),
                          torch.tensor(17.).log())


def test_loss_weights_act_on_their_own_sample():
    f, w = torch.randn(6, 5, requires_grad=True), torch.tensor([.1, .2, .5, 1, 2, 4])
    grad = lambda weights: torch.autograd.grad(corrector.loss(f, weights), f)[0]
    assert not torch.allclose(grad(w), grad(w.flip(0)), atol=1e-3)
    assert torch.allclose(grad(w), grad(3 * w), atol=1e-6)             # only ratios matter
    per_sample = torch.nn.functional.softplus(torch.logsumexp(f[:, 1:] - f[:, :1], 1))
    assert torch.allclose(corrector.loss(f, w), (w * per_sample).sum() / w.sum())
    with pytest.raises(ValueError):
        corrector.loss(f, w[:, None])


def tabular_game(control, rounds=40, steps=40, gamma=0.25, tau=1.0):
    """The whole game without a network: q over 6 items is a table, the lists are exact expectations
    of 'top 2'-like exposure softmax(2 log q): a decision that over-exposes the popular group.
    Returns data, q, E*, exposure, judger's accuracy.
    """
    torch.manual_seed(0)
    p = torch.tensor([.30, .25, .15, .12, .10, .08])
    credit = np.eye(2)[[0, 0, 1, 1, 1, 1]]
    star = p.numpy() @ credit
    exposure = lambda q: (q ** 2 / (q ** 2).sum()).numpy() @ credit
    theta, log_v, ends = torch.zeros(6, requires_grad=True), np.zeros(2), []
    opt = torch.optim.Adam([theta], lr=0.02)
    for _ in range(rounds):
        logq_t = theta.detach().log_softmax(0)
        if control:
            log_v = judger.control(log_v, star, exposure(logq_t.exp()), gamma)
        w = torch.as_tensor(judger.item_weights(credit, log_v), dtype=torch.float32)
        right = []
        for _ in range(steps):
            y = torch.multinomial(p, 512, True)
            made_up = torch.multinomial((logq_t / tau).softmax(0), 512 * 4, True).view(512, 4)
            items = torch.cat([y[:, None], made_up], 1)
            logq = theta.log_softmax(0)
            f = judger.score(logq[items], logq_t[items], logq_t[items], 1.0, 1.0)
            loss = corrector.loss(f, w[y])
            opt.zero_grad()
            loss.backward()
            opt.step()
            right.append(judger.accuracy(f.detach()))
        ends.append(theta.detach().softmax(0))
    q = torch.stack(ends[-15:]).mean(0)                # over the sampling's noise
    return p, q, star, exposure(q), np.mean(right)


def test_tabular_game_converges_to_the_data():
    p, q, _, _, right = tabular_game(control=False)
    assert (q - p).abs().max() < 0.02 and abs(right - 0.5) < 0.02


def test_tabular_game_at_a_temperature_sharpens():
    """Negatives from q^(1/tau) make p^tau the fixed point, not p."""
    p, q, *_ = tabular_game(control=False, tau=1.5)
    assert (q - (1.5 * p.log()).softmax(0)).abs().max() < 0.02 < (q - p).abs().max()


def test_tabular_game_converges_to_the_fair_exposure():
    _, _, star, unfair, _ = tabular_game(control=False)
    _, q, star, fair, _ = tabular_game(control=True)
    assert np.abs(unfair - star).max() > 0.1 and np.abs(fair - star).max() < 0.02
    assert q[0] > q[1] > 0 and q[2] > q[3] > q[4] > q[5]       # within a group, order is kept


# --------------------------------------------------------------------- data.py: sources and parsers

def ml1m(folder):
    """A folder in ML-1M's exact layout: '::', latin-1 accents, ids with gaps, one film under two
    ids, a remake.
    """
    folder.mkdir(parents=True)
    films = [(1, "Toy Story (1995)", "Animation|Children's|Comedy"),
             (3, "Cité des enfants perdus, La (1995)", "Adventure|Sci-Fi"),
             (7, "Sabrina (1995)", "Comedy|Romance"),
             (8, "Sabrina (1954)", "Comedy|Romance"), (11, "Ice Storm, The (1997)", "Drama"),
             (12, "Ice Storm, The (1997)", "Mystery"), (20, "Seven (Se7en) (1995)",
                                                        "Crime|Thriller"),
             (31, "Postman, The (Postino, Il) (1994)", "Drama"), (40, "Face/Off (1997)", "Action"),
             (52, "Nobody Rated Me (1990)", "Drama")] + \
            [(100 + k, f"Film Number {w} ({1980 + k})", "Action") for k,
             w in enumerate("One Two Three Four Five Six".split())]
    (folder / "movies.dat").write_text("".join(f"{i}::{t}::{g}\n" for i, t, g in films),
                                       encoding="latin-1")
    rng, lines = np.random.default_rng(0), []
    ids = [i for i, *_ in films if i != 52]
    for u in (1, 2, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16):
        for n, i in enumerate(rng.permutation(ids)[:12]):
            # ties in time
            lines.append(f"{u}::{i}::{rng.integers(1, 6)}::{978300000 + 1000 * u + n // 2}\n")
    # a user with one item
    lines.append("99::1::5::978300000\n")
    (folder / "ratings.dat").write_text("".join(lines), encoding="latin-1")
    return folder


def test_ml1m_layout(tmp_path, capsys):
    ml1m(tmp_path / "ml-1m")
    ds = data.prepare(*data.read_movielens(data.fetch_movielens("ml-1m", tmp_path)), "Movies:\n",
                      "movie")
    assert {"La Cité des enfants perdus", "The Postman (Il Postino)", "Seven (Se7en)",
            "Face/Off"} <= set(ds.titles)
    # a year only where it is needed
    assert {"Sabrina (1995)", "Sabrina (1954)"} <= set(ds.titles) and "Toy Story" in ds.titles
    assert ds.titles.count("The Ice Storm") == 1 and "Nobody Rated Me" not in ds.titles
    i = ds.titles.index("The Ice Storm")
    assert dict(zip(ds.groups, ds.credit[i]))["Drama"] == 0.5 and np.allclose(ds.credit.sum(1), 1)
    said = capsys.readouterr().out
    assert len(ds.users) == 12 and "1 of 13 users" in said and "1 of 15 items have ano" in said
    assert ds.users[:4] == ["1", "2", "5", "6"] and all(len(set(h)) == len(h) for h in ds.histories)
    first = [l.split("::") for l in (tmp_path / "ml-1m"
                                     / "ratings.dat").read_text("latin-1").splitlines()
             if l.startswith("1::")]
    known = {"1": "Toy Story", "40": "Face/Off", "7": "Sabrina (1995)"}
    # file order breaks the ties in time
    order = [f[1] for f in first if f[1] in known]
    assert [ds.titles[k] for k in ds.histories[0] if ds.titles[k] in known.values()] == [known[i]
        for i in order]


def test_ml100k_both_layouts(tmp_path):
    a, b = tmp_path / "a" / "ml-100k", tmp_path / "b" / "ml-100k"
    a.mkdir(parents=True), b.mkdir(parents=True)
    flags = lambda *on: "|".join(str(int(k in on)) for k in range(19))
    (a / "u.item").write_text(f"1|Toy Story "
                              f"(1995)|01-Jan-1995||http://x|{flags(3, 4, 5)}\n2|Misérables, Les "
                              f"(1995)|||http://y|{flags(8)}\n", encoding="latin-1")
    (a / "u.data").write_text("1\t2\t3\t20\n1\t1\t5\t10\n")
    (b / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tMisérables, Les\t1995\tDrama\n",
        encoding="utf-8")
    (b / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "1\t2\t3\t20\n1\t1\t5\t10\n")
    x, y = (data.read_movielens(data.fetch_movielens("ml-100k", d)) for d in (tmp_path / "a",
        tmp_path / "b"))
    assert x == y and x[0]["1"] == ("Toy Story", "1995", ["Animation", "Children's", "Comedy"])
    assert x[1] == [("1", "2", 20), ("1", "1", 10)]


@pytest.mark.parametrize("title, want", [("Ice Storm, The", "The Ice Storm"),
                                         ("Fish Called Wanda, A", "A Fish Called Wanda"),
                                         ("Bye Bye, Love", "Bye Bye, Love"),
                                         ("Postino, Il", "Il Postino"),
    ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard "
     "sur le toit)"), ("Englishman Who Went Up a Hill, But Came Down a Mountain, The",
                       "The Englishman Who Went Up a Hill, But Came Down a Mountain"),
    ("Eau froide, L'", "L'Eau froide"), ("Fast, Cheap & Out of Control",
                                         "Fast, Cheap & Out of Control")])
def test_natural_titles(title, want):
    assert data.natural(title) == want


def test_zip_is_checked_and_unpacked_by_name(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as z:
        for f in ("ratings.dat", "movies.dat"):
            z.writestr("../../ml-1m/" + f, "x")
    with pytest.raises(data.InputError, match="md5"):
        data.fetch_movielens("ml-1m", tmp_path)
    assert not (tmp_path / "ml-1m").exists()
    monkeypatch.setitem(data.ML_MD5, "ml-1m",
                        hashlib.md5((tmp_path / "ml-1m.zip").read_bytes()).hexdigest())
    folder = data.fetch_movielens("ml-1m", tmp_path)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["movies.dat", "ratings.dat"] and folder.parent == tmp_path


def test_a_truncated_zip_is_named(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as z:
        z.writestr("ml-1m/ratings.dat", "x" * 1000)
    raw = (tmp_path / "ml-1m.zip").read_bytes()
    for content, why in ((raw[:-40], "not a readable zip"), (raw, "no movies.dat in it")):
        (tmp_path / "ml-1m.zip").write_bytes(content)
        monkeypatch.setitem(data.ML_MD5, "ml-1m", hashlib.md5(content).hexdigest())
        with pytest.raises(data.InputError, match=f"ml-1m.zip: {why}"):
            data.fetch_movielens("ml-1m", tmp_path)


def test_two_runs_that_fetch_at_once_do_not_break_each_other(tmp_path, monkeypatch):
    """Eight threads, one slow download: every one of them ends up with the whole file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in data.ML_FILES["ml-1m"]:
            z.writestr("ml-1m/" + name, name * 5000)
    raw = buffer.getvalue()
    monkeypatch.setitem(data.ML_MD5, "ml-1m", hashlib.md5(raw).hexdigest())

    class Slow(io.BytesIO):
        def read(self, n=-1):
            time.sleep(0.01)
            return super().read(min(n, 5000))
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **k: Slow(raw))
    done = []

    def fetch():
        folder = data.fetch_movielens("ml-1m", tmp_path)
        done.append(all((folder / f).read_text() == f * 5000 for f in data.ML_FILES["ml-1m"]))
    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for t in threads:
        t.start()
        time.sleep(0.005)
    for t in threads:
        t.join()
    left = sorted(p.name for p in tmp_path.rglob("*"))
    assert done == [True] * 8 and left == ["ml-1m", "ml-1m.zip", "movies.dat", "ratings.dat"]


def test_no_network_and_no_fallback_says_which_file(tmp_path, monkeypatch):
    def refuse(*a, **k):
        raise OSError("no route")
    other = lambda *a, **k: io.BytesIO(b"<html>please log in</html>")
    for answer, why in ((refuse, "no route"), (other, "damaged, or another file")):
        monkeypatch.setattr(data.urllib.request, "urlopen", answer)
        with pytest.raises(data.InputError, match=f"{why}.*put ml-1m.zip"):
            data.fetch_movielens("ml-1m", tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line, why", [("1::2::3\n", "ratings.dat:1: 3 fields"), ("", "no ratings"),
                                       ("1::1::5::soon\n", "ratings.dat:1: .*not a number"),
                                       ("1::1::5::nan\n", "not a number"),
                                       ("1::999::5::10\n", "no ratings in it of known items")])
def test_bad_ratings_are_named_by_line(tmp_path, line, why):
    folder = ml1m(tmp_path / "ml-1m")
    (folder / "ratings.dat").write_text(line)
    with pytest.raises(data.InputError, match=why):
        data.read_movielens(folder)


def own_folder(folder, items=None, interactions=None):
    """A data set of one's own: nine books, six readers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    (folder / "items.csv").write_text(items if items is not None else "item_id,title,groups\n"
        + "".join(f'b{k},"The {w}, Vol. {k}",{g}\n' for k, (w, g) in enumerate(zip(
            "Sea Sun Hill Town Road Lake Moon Star Tree".split(),
            "poetry poetry novel novel novel essay essay poetry|essay novel|essay".split()))))
    (folder / "interactions.csv").write_text(interactions if interactions is not None else
        "user_id,item_id,timestamp\n" + "".join(f"ann{u},b{i},{t}\n" for u in range(6)
                                                for t, i in enumerate(rng.permutation(9)[:7])))
    return folder


def test_own_data_as_csv_or_recbole_files(tmp_path):
    a = data.load_dataset(str(own_folder(tmp_path / "csv")), header="Books read:")
    assert a.header == "Books read:\n" and a.groups == ["essay", "novel", "poetry"]
    assert len(a.titles) == 9 and "The Sea, Vol. 0" in a.titles and len(a.users) == 6
    assert a.credit[a.titles.index("The Star, Vol. 7")].tolist() == [0.5, 0, 0.5]
    folder = tmp_path / "recbole"
    folder.mkdir()
    convert = lambda name: (tmp_path / "csv" / name).read_text().replace("|", " ")
    items = [line.replace('"', "").rsplit(",", 1) for line in convert("items.csv").splitlines()[1:]]
    head = "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
    (folder / "books.item").write_text(head + "".join(
        f"{left.split(',', 1)[0]}\t{left.split(',', 1)[1]}\t{g}\n" for left, g in items))
    (folder / "books.inter").write_text(convert("interactions.csv").replace(",", "\t").replace(
        "user_id\titem_id\ttimestamp", "user_id:token\titem_id:token\ttimestamp:float"))
    b = data.load_dataset(str(folder))
    assert a.titles == b.titles and (a.credit == b.credit).all()
    assert all((x == y).all() for x, y in zip(a.histories, b.histories))


ITEMS, CLICKS = "item_id,title,groups\n", "user_id,item_id,timestamp\n"


@pytest.mark.parametrize("items, interactions, why", [
    ("id,title\n", None, "items.csv:1: no column item_id"),
    (ITEMS + "b0\n", None, "items.csv:2: 1 fields where the header has 3"),
    ("", None, "it has none"),
    (ITEMS + 'b0,"Sea,x\n', None, "items.csv: "),
    (ITEMS, None, "no ratings in it of known items"),
    (ITEMS + "b0, ,x\nb1,Sea,y\n", None, "item b0 has no title"),
    (None, CLICKS, "interactions.csv: no ratings"),
    (None, CLICKS + "ann,b0,noon\n", "interactions.csv:2: the time 'noon'"),
    (None, CLICKS + "ann,b0,1\nann,b1,2\n", "no user has the 5 items"),
    (ITEMS + "".join(f"b{k},Book {k},x\n" for k in range(9)), None, "every item is in the group"),
    (ITEMS + "".join(f"b{k},Book,{'xy'[k % 2]}\n" for k in range(9)), None, "no user has the 5"),
])
def test_bad_data_of_ones_own(tmp_path, items, interactions, why):
    folder = own_folder(tmp_path / "own", items, interactions)
    with pytest.raises(data.InputError, match=why):
        data.load_dataset(str(folder))


def test_more_bad_data(tmp_path, capsys):
    folder = own_folder(tmp_path / "own")
    (folder / "items.csv").write_bytes(b"item_id,title,groups\nb0,\xff\xfe,x\n")
    with pytest.raises(data.InputError, match="not utf-8"):
        data.load_dataset(str(folder))
    (folder / "interactions.csv").unlink()
    with pytest.raises(data.InputError, match="No such file"):
        own_folder(tmp_path / "own"), (folder / "interactions.csv").unlink()
        data.load_dataset(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.InputError, match="neither items.csv"):
        data.load_dataset(str(tmp_path / "empty"))
    four = own_folder(tmp_path / "four", ITEMS + "".join(f"b{k},Book {k},{'xy'[k % 2]}\n"
        for k in range(4)), CLICKS + "".join(f"ann,b{k},{k}\n" for k in range(4)))
    with pytest.raises(data.InputError, match="no user has"):
        data.load_dataset(str(four))
    with pytest.raises(data.InputError, match="no user has the 19 items"):
        data.load_dataset("toy", holdout=8)
    capsys.readouterr()
    left = len(data.load_dataset("toy", holdout=6).users)
    assert f"! {900 - left} of 900 users have fewer than 15 items" in capsys.readouterr().out
    # a line break inside a quoted title is only a blank
    odd = own_folder(tmp_path / "odd", ITEMS + "".join(f'b{k},"Book\n{k}",{"xy"[k % 2]}\n'
                                                       for k in range(9)))
    assert "Book 3" in data.load_dataset(str(odd)).titles
    with pytest.raises(data.InputError, match="line break"):
        Catalog(["Sea\nSun"], "H:\n", None, 5)
    ds = data.load_dataset(str(own_folder(tmp_path / "own")))
    ds.titles = ds.titles[:4]
    with pytest.raises(data.InputError, match="at least 5 titles"):
        data.popularity_groups(ds)


@pytest.mark.parametrize("layout", ["ml-1m", "u.item", "recbole", "csv"])
def test_fuzzed_files_load_or_are_refused_in_a_line(tmp_path, layout):
    """Any bytes in any of the files: a data set, or an InputError, nothing else."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    names = {"ml-1m": ("movies.dat", "ratings.dat"), "u.item": ("u.item", "u.data"),
             "recbole": ("x.item", "x.inter"), "csv": ("items.csv", "interactions.csv")}[layout]
    heads = {"recbole": ("item_id:token\ttitle:token_seq\tclass:token_seq\n",
                         "user_id:token\titem_id:token\ttimestamp:float\n"),
             "csv": (ITEMS, CLICKS)}.get(layout, ("", ""))
    sep = {"ml-1m": "::", "u.item": "|", "recbole": "\t", "csv": ","}[layout]
    piece = st.sampled_from(["1", "2", "3", "Heat (1995)", "Heat, The", "a|b", "", " ", "0", "9e9",
                             "-1", "nan", '"', "\t", "::", "|", "é", "\0", "\r", "1e999"])
    line = st.lists(piece, min_size=1, max_size=6).map(sep.join)
    # ratings that fit: five items by one user, so that some examples get to the end
    good = "".join(sep.join(["7", str(k), "5", str(k)]) + "\n" for k in range(1, 6))
    text = st.lists(line, max_size=8).map("\n".join)
    content = st.one_of(text.map(lambda t: t.encode("utf-8")), st.binary(max_size=60),
                        text.map(lambda t: (t + "\n" + good).encode("latin-1", "ignore")))

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(content, content, st.booleans())
    def check(a, b, headed):
        for name, head, body in zip(names, heads, (a, b)):
            (tmp_path / name).write_bytes((head.encode() if headed else b"") + body)
        try:
            ds = data.prepare(*data.read_movielens(tmp_path), "H:\n", "film")
            assert np.allclose(ds.credit.sum(1), 1) and all(t.strip() for t in ds.titles)
        except data.InputError as e:
            assert len(str(e).splitlines()) == 1
    check()


def test_popularity_groups_and_windows(toy):
    ds, catalog, _ = toy
    ds = data.load_dataset("toy", group_by="popularity", max_users=40)
    count = ds.train_counts()
    assert ds.credit.shape[1] == 5 and np.ptp(ds.credit.sum(0)) <= 1
    assert all(count[ds.credit[:, g] == 1].min() >= count[ds.credit[:, g + 1] == 1].max()
               for g in range(4))
    h = data.load_dataset("toy", holdout=2, max_users=40)
    user, history, target = h.cases("test")
    val_user, val_history, val_target = h.cases("val")
    assert len(user) == 2 * len(h.users) and all(t not in x for x, t in zip(history, target))
    assert target[1] == h.histories[0][-1] and val_target[1] == h.histories[0][-3]
    assert len(val_history[0]) == len(h.train(0))
    rng, seen = np.random.default_rng(0), np.zeros(len(ds.titles), int)
    train_part = [ds.train(u) for u in range(len(ds.users))]
    gen = training_batches(train_part, 5, 1, catalog.lengths, rng)
    targets = sum(len(ds.train(u)) - 1 for u in range(len(ds.users)))
    # one epoch: every title but the first, once
    while targets > 0:
        w, = next(gen)
        targets -= len(w) - 1
        np.add.at(seen, w[1:], 1)
    want = np.bincount(np.concatenate([ds.train(u)[1:] for u in range(len(ds.users))]),
                       minlength=len(ds.titles))
    assert targets == 0 and (seen == want).all()
    # batches of like length: hardly any padding, where drawing at random would have much
    size = lambda w: catalog.lengths[w].sum()
    gen = training_batches(train_part, 30, 8, catalog.lengths, rng)
    batches = [[size(w) for w in next(gen)] for _ in range(12)]
    padding = lambda batches: sum(8 * max(b) for b in batches) / np.sum(batches) - 1
    assert padding(batches) < 0.5 * padding(rng.permutation(np.ravel(batches)).reshape(12, 8))


def test_differences_are_paired():
    """Two policies that share nearly all lists: the difference is far surer than either figure."""
    rng = np.random.default_rng(0)
    users, targets = np.arange(400), rng.integers(50, size=400)
    A = np.eye(5)[rng.integers(5, size=50)]
    a = np.stack([rng.choice(50, 10, replace=False) for _ in users])
    b = a.copy()
    b[:20] = np.stack([rng.choice(50, 10, replace=False) for _ in range(20)])
    shown = [rng.integers(50, size=12) for _ in users]
    d = metrics.difference(A, users, shown, a, b, targets)
    rows = [metrics.report(A, users, shown, x, targets, np.zeros(400)) for x in (a, b)]
    for m in ("HR@10", "NDCG@10", "MGU@10", "DGU@10"):
        assert d[m][0] == pytest.approx(rows[0][m] - rows[1][m]) and d[m][1] <= d[m][0] <= d[m][2]
        assert d[m][2] - d[m][1] < 0.6 * (rows[0]["ci"][m][1] - rows[0]["ci"][m][0])
    same = metrics.difference(A, users, shown, a, a, targets)
    assert all(v == [0, 0, 0] for v in same.values())


def test_rerank_bias_brings_lists_to_the_target():
    rng = np.random.default_rng(1)
    A = np.eye(4)[rng.integers(4, size=80)]
    scores = rng.normal(size=(300, 80)) + A @ np.array([1.0, 0.3, 0.0, -0.8])
    want = np.full(4, 0.25)
    lists = lambda s: np.argsort(-s, axis=1)[:, :10]
    unfair = lambda s: metrics.mgu(metrics.exposure(*metrics.group_sums(A, lists(s))) - want)
    beta = judger.fit_bias(scores, A, want, 10)
    assert unfair(scores) > 0.1 and unfair(scores + A @ beta) < 0.01


def test_top_of_scores():
    scores = np.random.default_rng(0).normal(size=(50, 12))
    assert (judger.top(scores, 5) == np.argsort(-scores, axis=1)[:, :5]).all()
    scores[:, 3:] = -np.inf                                             # seen
    assert (np.sort(judger.top(scores, 5), 1) == [-1, -1, 0, 1, 2]).all()


def test_sft_as_a_loss_has_the_log_losss_gradient():
    logq, w = torch.randn(6, 4, requires_grad=True), torch.rand(6)
    ref = torch.randn(6, 4)
    got, = torch.autograd.grad(corrector.sft(judger.score(logq, ref, ref, 1.0, 1.0), w), logq)
    want, = torch.autograd.grad(-(w / w.mean() * logq[:, 0]).mean(), logq)
    assert torch.allclose(got, want)


# ---------------------------------------------------------------------- train.py

def test_spaced_keeps_all_cases_of_its_users():
    user = np.repeat(np.arange(10), 2)
    kept, history, target = data.spaced((user, list(range(20)), np.arange(20)), 5)
    assert kept.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8] and target.tolist() == history
    assert data.spaced((user, [None] * 20, user), 0)[0].tolist() == user.tolist()


def test_train_users_sees_the_histories_of_so_many_users_alone(tmp_path):
    """--train_users: the few-shot regime; every window is of one of those users, evenly spaced."""
    run = train.Run(train.configure([*SMALL, f"--out_dir={tmp_path}", "--train_users=4"]))
    n, windows = len(run.ds.users), [w for _, b in zip(range(20), run.batches(1, 0)) for w in b]
    of = lambda w: {u for u in range(n) if set(w) <= set(run.ds.train(u))}
    kept = {0, n // 4, n // 2, 3 * n // 4}
    assert all(of(w) & kept for w in windows)
    assert set().union(*(of(w) for w in windows if len(of(w)) == 1)) == kept
    assert len(run.cases["test"][0]) == n               # everyone is measured
    # what popularity counts, too
    count = 1 + np.bincount(np.concatenate([run.ds.train(u) for u in kept]), minlength=250)
    assert run.yardsticks()["popularity"]["log_loss"] == pytest.approx(
        -np.log(count[run.cases["test"][2]] / count.sum()).mean())


def test_options():
    cfg = train.configure(["--dropout=0", "--dataset=ml100k", "--out_dir=a=b", "--compile=False"])
    assert cfg.dropout == 0.0 and isinstance(cfg.dropout, float)
    assert cfg.out_dir == "a=b" and "SmolLM2" in cfg.init_from
    assert train.configure([]).init_from == "scratch"
    assert train.configure(["--dataset=ml1m"]).out_dir == "out/ml1m"
    for bad, why in (("--rouns=3", "rounds"), ("--dataset=ml10k", "ml100k"), ("--topk=0", "topk"),
                     ("--seed=x", "int"), ("rounds=1", "--key=value"),
                     ("--temperature=0", "above 0"), ("--alpha=1.5", "alpha"),
                     ("--group_by=genres", "genre"), ("--sft_full=maybe", "True or False"),
                     ("--history=0", "history"), ("--lr=-1", "above 0"), ("--lr=nan", "above 0"),
                     ("--sft_lr=inf", "too large"), ("--num_negatives=0", "num_negatives"),
                     ("--alpha=-0.1", "alpha"), ("--gamma=nan", "gamma"), ("--gamma=-1", "gamma"),
                     ("--seed=-1", "seed"), ("--dataset=no/such/folder", "no such folder"),
                     ("--dim=30", "twice"), ("--dropout=1", "dropout"), ("--rounds", "int"),
                     ("--weight_decay=-1", "weight_decay"), ("--tokens=item", "items"),
                     ("--n_heads=0", "n_heads"), ("--dim=0", "dim"), ("--n_layers=0", "n_layers"),
                     ("--device=gpu", "cpu"), ("--dtype=fp16", "float16")):
        with pytest.raises(data.InputError, match=why):
            train.configure([bad])
    assert exit_code(lambda: (_ for _ in ()).throw(OSError())) == 2     # an error without words


SMALL = ["--pretrain_iters=20", "--sft_iters=20", "--eval_every=10", "--batch_size=8",
         "--rounds=2", "--round_iters=4", "--max_users=60", "--branches=3", "--num_negatives=4",
         "--dropout=0.2", "--game_dropout=True"]


def test_toy_end_to_end_and_bitwise_again(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        train.main(train.configure([*SMALL, "--game_dropout=False", "--vocab_users=20",
                                    f"--out_dir={tmp_path / name}"]))
        r = json.loads((tmp_path / name / "results.json").read_text())
        results.append(r)
        assert [row["stage"] for row in r["rows"]] == ["pretrained", "pretrained-vocab", "sft",
                                                       "ufo-1", "ufo-2"]
        assert {"HR@10", "NDCG@10", "MGU@10", "DGU@10", "coverage", "ci", "collapsed",
                "log_loss"} <= set(r["rows"][0])
        assert {"groups", "E_star", "E_pre", "E_sft", "covariance",
                "correlation"} <= set(r["origins"]) and r["config"]["seed"] == 0
        lines = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        events = {x["event"] for x in lines}
        assert {"pretrain", "sft", "eval", "correct", "round"} <= events
        first = next(x for x in lines if x["event"] == "correct")      # the player is its opponent:
        assert first["loss"] == pytest.approx(math.log(5), abs=1e-4)   # f = 0
    assert results[0] == results[1]
    assert not list(tmp_path.glob("*/checkpoint*"))
    # SFT's validation row is that of its best look, and is what measuring it again gives
    looks = {row["stage"]: row for row in results[0]["validation"]}
    best = max(("sft 10", "sft 20"), key=lambda stage: looks[stage]["NDCG@10"])
    assert looks["sft"]["E"] == looks[best]["E"] and looks["sft"]["less_sft"]["MGU@10"] == [0, 0, 0]
    # (5) by both softmaxes: the vocabulary's on its own users
    vocab = next(row for row in results[0]["rows"] if row["over"] == "vocab")
    of = results[0]["origins"]["vocab"]
    assert of["E_pre"] == vocab["E"] and of["E_star"] == vocab["E_star"]
    assert of["b"] == pytest.approx(np.subtract(vocab["E"], vocab["E_star"]))
    assert of["E_pre"] != results[0]["origins"]["E_pre"]
    # and is not overwritten
    kept = (tmp_path / "a" / "results.json").read_bytes()
    with pytest.raises(data.InputError, match="a finished run"):
        train.main(train.configure([*SMALL, f"--out_dir={tmp_path / 'a'}"]))
    assert (tmp_path / "a" / "results.json").read_bytes() == kept
    run = train.trained(tmp_path / "a")
    run.open(tmp_path / "again")
    again = run.measure("sft", "val")
    assert all(again[k] == looks["sft"][k] for k in ("E", "log_loss", "HR@10", "ci", "less_sft"))
    # and what it learned can be asked
    titles = data.load_dataset("toy", max_users=60).titles
    ask = [f"--out_dir={tmp_path / 'a'}", titles[3].upper(), f"  {titles[70].lower()}!"]
    capsys.readouterr()
    assert exit_code(recommend.main, [*ask, "--json", "--topk=5"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["history"] == [titles[3], titles[70]] and set(got["lists"]) == {"pretrained", "sft",
                                                                               "ufo"}
    for name, found in got["lists"].items():
        p = [x["probability"] for x in found]
        assert len(p) == 5 and p == sorted(p, reverse=True) and 0 < sum(p) < 1
        assert not {titles[3], titles[70]} & {x["title"] for x in found}
        assert sum(got["exposure"][name].values()) == pytest.approx(1)
    assert exit_code(recommend.main, [ask[0], "--user=7"]) == 0
    assert "share of" in capsys.readouterr().out
    for bad, why in (([ask[0]], "--user=ID"), ([ask[0], "--user=x"], "not a user"),
                     ([ask[0], titles[3][:-1]], "did you mean"),
                     (["--out_dir=none", "x"], "model.pt"),
                     ([ask[0], "--topk=250", titles[3]], "250 titles")):
        assert exit_code(recommend.main, bad) == 2 and why in capsys.readouterr().err


def test_a_trained_model_is_asked_about_its_own_titles_only(tmp_path, capsys):
    folder, out = own_folder(tmp_path / "own"), f"--out_dir={tmp_path / 'out'}"
    assert train.cli([f"--dataset={folder}", out, "--init_from=scratch", "--tokens=items",
                      "--sft_iters=2", "--rounds=0", "--vocab_users=0", "--topk=3"]) == 0
    ask = [out, "--topk=3", "--user=ann1"]
    assert exit_code(recommend.main, ask) == 0
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    torch.save({k: v for k, v in saved.items() if k != "made_of"}, tmp_path / "out" / "model.pt")
    assert exit_code(recommend.main, ask) == 2 and "another version" in capsys.readouterr().err
    torch.save(saved, tmp_path / "out" / "model.pt")
    head, *lines = (folder / "items.csv").read_text().splitlines()
    (folder / "items.csv").write_text("\n".join([head, *lines[::-1]]))  # the numbers turned round
    capsys.readouterr()
    assert exit_code(recommend.main, ask) == 2
    assert re.search(r"model.pt was made of scratch, 9 titles \(.*; here is scratch, 9 titles",
                     capsys.readouterr().err)


def test_titles_are_found_kindly():
    titles = ["The Ice Storm", "Sabrina (1954)", "Sabrina (1995)", "La Cité des enfants perdus",
              "Heat"]
    years = ["1997", "1954", "1995", "1995", "1995"]
    for text, want in (("ice storm, the", 0), ("Ice Storm, The (1997)", 0), ("HEAT (1995)", 4),
                       ("Sabrina (1995)", 2), ("la cite des enfants perdus", 3)):
        assert recommend.find(text, titles, years) == want, text
    for text, why in (("Sabrina", "add the year"), ("Heat (1986)", "no title"),
                      ("The Icestorm", "did you mean The Ice Storm")):
        with pytest.raises(data.InputError, match=why):
            recommend.find(text, titles, years)


def train_py(*args):
    return subprocess.Popen([sys.executable, "train.py", *args], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"})


def test_killed_at_random_moments_a_run_ends_as_if_it_never_was(tmp_path):
    """SIGKILL six times, Ctrl-C once: the same results.json, byte for byte, and the same log but
    for its minutes. On two threads.
    """
    small = [*SMALL, "--max_users=40", "--save_every=0"]
    whole, broken, random_ = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    run = train_py(*small, f"--out_dir={whole}")
    said = run.stdout.read()
    assert run.wait() == 0, said
    args, kills, resumed, interrupted = [*small, f"--out_dir={broken}"], 0, set(), False
    while not (broken / "results.json").exists():
        run = train_py(*args)
        # let it begin to work, then a moment
        begun = "going on from" if "--resume" in args else "model:"
        for line in run.stdout:
            if line.startswith(begun):
                resumed.add(line.split()[3] if "--resume" in args else "nothing")
                break
        while run.poll() is None and not (broken / "checkpoint.pt").exists():
            time.sleep(0.01)
        time.sleep(random_.uniform(0, 1))
        if kills < 6:
            run.kill()
            kills += 1
        elif not interrupted:
            run.send_signal(signal.SIGINT)
            interrupted = True
        said = run.stdout.read()
        assert run.wait() in (0, -9, 130), said[-2000:]
        assert run.returncode != 130 or re.search("stopped and saved; to go on: python .*train.py "
                                                      "--resume", said) or "stopped before" in said
        if any((broken / f"checkpoint{x}.pt").exists() for x in ("", ".previous")):
            args = ["--resume", f"--out_dir={broken}"]
    assert kills == 6 and len(resumed) > 1, resumed
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    lines = [[{k: v for k, v in json.loads(x).items() if k not in ("minutes", "seconds")
               and "_per_s" not in k} for x in (d / "log.jsonl").read_text().splitlines()]
             for d in (whole, broken)]
    wanted = [[x for x in ls if x["event"] not in ("speed", "done")] for ls in lines]
    assert wanted[0] == wanted[1]
    run = train_py("--resume", f"--out_dir={broken}")
    assert "finished" in run.stdout.read() and run.wait() == 0


def test_resume_refuses_other_options_and_survives_damage(tmp_path, capsys):
    out = tmp_path / "out"

    def unfinished():
        run = train.Run(train.configure([*SMALL, f"--out_dir={out}"]))
        for _ in range(2):
            run.state["it"] += 1
            run.save()
    unfinished()
    with pytest.raises(data.InputError, match="unfinished run: --resume"):
        train.Run(train.configure([*SMALL, f"--out_dir={out}"]))
    with pytest.raises(data.InputError, match="sft_iters was 20"):
        train.configure(["--resume", f"--out_dir={out}", "--sft_iters=21"])
    assert train.configure(["--resume", f"--out_dir={out}"]).sft_iters == 20
    raw = bytearray((out / "checkpoint.pt").read_bytes())
    raw[len(raw) // 2] ^= 1                                            # one bit
    (out / "checkpoint.pt").write_bytes(raw)
    run = train.Run(train.configure(["--resume", f"--out_dir={out}"]))
    assert run.state["it"] == 1 and "checkpoint.pt is damaged" in capsys.readouterr().out
    (out / "checkpoint.previous.pt").write_bytes(b"short")
    assert machine.read_checkpoint(out) is None
    # with nothing whole to go on from, it does not begin something else
    for folder in (out, tmp_path / "typo"):
        with pytest.raises(data.InputError, match="no whole checkpoint"):
            train.configure(["--resume", f"--out_dir={folder}"])


def test_resume_keeps_its_places_and_its_data(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text("a finished run's\n" * 99)           # of no run that goes on
    (out / "results.json").write_text("{}")
    cfg = train.configure([*SMALL, f"--out_dir={out}", "--data_dir=elsewhere", "--save_every=7"])
    with pytest.raises(data.InputError, match="a finished run"):
        train.Run(cfg)
    assert (out / "log.jsonl").stat().st_size and (out / "results.json").exists()
    (out / "results.json").unlink()
    run = train.Run(cfg)
    run.save()
    assert machine.read_checkpoint(out)["log_size"] == 0
    cfg = train.configure(["--resume", f"--out_dir={out}", "--track=tensorboard"])
    assert cfg.data_dir == "elsewhere" and cfg.save_every == 7
    cfg.track = ""
    assert train.configure(["--resume", f"--out_dir={out}", "--save_every=8"]).save_every == 8
    titles, clicks = run.made_of()[1:]
    run.source = "base@new"
    run.check_made_of(["base@old", titles, clicks], "it")
    assert "! it was made on base@old, here is base@new" in capsys.readouterr().out
    for older in (["base@new", 250, 9], ["another version of this code"]):
        with pytest.raises(data.InputError, match="it was made of"):
            run.check_made_of(older, "it")
    run.source = "another base"
    run.save()
    with pytest.raises(data.InputError, match="another run is at work there"):
        train.Run(cfg)
    run.log_file.close()
    with pytest.raises(data.InputError, match="was made of another base, 250 titles"):
        train.Run(cfg)


def test_full_disk_loses_neither_run_nor_checkpoint(tmp_path, monkeypatch, capsys):
    run = train.Run(train.configure([*SMALL, f"--out_dir={tmp_path}"]))
    run.save()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(machine.os, "fsync", full)
    run.state["it"] = 7
    run.save()
    said = capsys.readouterr().out
    assert "could not be written (No space left" in said and not (tmp_path
                                                                  / "checkpoint.new.pt").exists()
    assert machine.read_checkpoint(tmp_path)["state"]["it"] == 0
    run.log_file = open("/dev/full", "w") if Path("/dev/full").exists() else run.log_file
    run.log(event="x")
    assert not Path("/dev/full").exists() or "a line was lost" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = train.Run(train.configure([*SMALL, f"--out_dir={tmp_path}"]))
    with pytest.raises(SystemExit, match="pretrain, step 0"):
        run.step(sum(p.sum() for p in run.params) * float("nan"))
    before = run.params[0].detach().clone()             # the loss is 0, its gradient 0 / 0
    with pytest.raises(SystemExit, match="gradient's norm nan"):
        run.step(((run.params[0] * 0) ** 2).sum().sqrt())
    assert torch.equal(run.params[0], before)


def test_sft_and_the_game_learn(tmp_path):
    """A short toy run: SFT lowers the held-out log-loss, the game MGU by more than its interval.
    """
    cfg = train.configure([f"--out_dir={tmp_path}", "--max_users=300", "--pretrain_iters=60",
                           "--sft_iters=120", "--eval_every=60", "--rounds=2", "--round_iters=25",
                           "--batch_size=16"])
    train.main(cfg)
    rows = {r["stage"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["sft"]["log_loss"] < rows["pretrained"]["log_loss"]
    assert rows["ufo-2"]["MGU@10"] < rows["sft"]["ci"]["MGU@10"][0]


def test_ml1m_end_to_end_for_a_few_steps(tmp_path, monkeypatch):
    """ML-1M's layout with a pretrained model from a folder: everything but the download."""
    ml1m(tmp_path / "data" / "ml-1m")
    hf, _ = hf_pair("llama", vocab_size=420, tie_word_embeddings=True)
    hf.save_pretrained(tmp_path / "model")
    bpe_tokenizer(pre_tokenizer_kinds()["smollm2"]).save_pretrained(tmp_path / "model")
    train.main(train.configure(["--dataset=ml1m", f"--data_dir={tmp_path / 'data'}",
                                f"--init_from={tmp_path / 'model'}",
                                f"--out_dir={tmp_path / 'out'}", "--topk=3", "--lora_rank=2",
                                "--alpha=0.5",
                                "--sft_iters=3", "--eval_every=2", "--rounds=1", "--round_iters=2",
                                "--batch_size=2", "--branches=2", "--num_negatives=3"]))
    r = json.loads((tmp_path / "out" / "results.json").read_text())
    assert r["rows"][-1]["stage"] == "ufo-1" and 0 <= r["rows"][-1]["HR@3"] <= 1
    assert "Sci-Fi" in r["origins"]["groups"]
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert saved["tuned"] and all("lora_" in k for k in saved["tuned"])
    # the adapter opens in PEFT, on the model it was trained on, with the same logits
    peft = pytest.importorskip("peft")
    run = train.trained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model",
                                                             dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    x = torch.randint(420, (2, 30))
    with torch.no_grad():
        plain = run.policies("pretrained").eval()
        without = plain.logits(plain(x))
        ours = run.policies("player").eval()
        got, want = ours.logits(ours(x)), theirs(x).logits
    assert torch.allclose(got, want, atol=1e-4) and not torch.allclose(got, without, atol=1e-4)
    assert peft.PeftConfig.from_pretrained(tmp_path / "out"
                                           / "adapter").base_model_name_or_path.endswith("model")


def test_benchmark_agrees_with_transformers_and_writes_json(tmp_path):
    small = ["--dim=48", "--n_layers=2", "--n_heads=6", "--n_kv_heads=2", "--ffn_dim=96",
             "--vocab_size=6000", "--n_titles=300", "--history=6", "--repeats=1", "--users=3",
             "--device=cpu", "--dtype=float32", f"--out={tmp_path / 'bench.json'}"]
    bench.main(bench.Bench(**parse(small, bench.Bench)))
    got = json.loads((tmp_path / "bench.json").read_text())
    assert all(got[k]["ours_s"] > 0 and got[k]["peer_s"] > 0 and got[k]["ratio"] > 0
               for k in ("corrector", "corrector_S16", "sft", "topk")) and got["hardware"]
    world = bench.World(bench.Bench(**parse(small, bench.Bench)), torch.device("cpu"),
                        torch.float32)
    broken = lambda: bench.our_sft(world.model, world, windows) * 1.01
    world.model.use("player")
    windows, hf = world.histories(2, 7), bench.twin(world.model)
    with pytest.raises(SystemExit, match="the sides differ"):
        bench.agree(world, "sft", broken, lambda: bench.peer_sft(hf, world, windows), 1e-4)


def test_memory_is_counted_by_hand_and_the_bases_have_their_published_sizes(capsys, monkeypatch):
    layer = torch.nn.Linear(3, 2, bias=False)
    x = torch.ones(5, 3)
    # of y^2: y (5, 2) is kept; of y: x (5, 3); not the layer's own weight
    assert bench.saved_bytes(layer, lambda: layer(x).pow(2)) == 4 * (10 + 15)
    sizes = {"SmolLM2-135M": 134515008, "SmolLM2-360M": 361821120, "SmolLM2-1.7B": 1711376384,
             "Qwen2.5-0.5B": 494032768, "Qwen2.5-1.5B": 1543714304, "Llama-3.2-1B": 1235814400,
             "Llama-2-7b-hf": 6738415616}
    models = {name.split("/")[1]: bench.without_weights(name) for name in bench.BASES}
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()} == sizes
    monkeypatch.setattr(bench, "BASES", {"a/small": (4, 32, 4, 2, 8, 64, 8192, True)})
    cfg = bench.Bench(n_titles=100, history=5, batch=2, device="cpu")
    row, = bench.memory(cfg, torch.device("cpu"), torch.float32)["memory"]
    # no outside figure to compare with, but a whole model of four blocks keeps what was foretold
    cfg.vocab_size = 8192
    world = bench.World(cfg, torch.device("cpu"), torch.float32,
                        ModelConfig(8192, 32, 4, 4, 2, 8, 64))
    windows, model = world.histories(2, 6), world.model.use("player")
    held = bench.saved_bytes(model, lambda: bench.our_sft(model, world, windows)) / 2 ** 30
    assert row["sft"] == pytest.approx(held, rel=1e-9)
    assert 0 < row["sft, recompute"] < row["sft"] < row["corrector"]
    assert "a/small" in capsys.readouterr().out


def test_bad_machines_models_and_folders(tmp_path, monkeypatch):
    small = lambda *more: train.configure([*SMALL, f"--out_dir={tmp_path / 'out'}", *more])
    if not torch.cuda.is_available():
        with pytest.raises(data.InputError, match="no GPU"):
            train.Run(small("--device=cuda"))
    if not torch.backends.mps.is_available():
        with pytest.raises(data.InputError, match="no Apple GPU"):
            train.Run(small("--device=mps"))
    with pytest.raises(data.InputError, match="the catalog has 250 titles"):
        train.Run(small("--topk=250"))
    with pytest.raises(data.InputError, match="num_negatives=251: the catalog has 250"):
        train.Run(small("--method=sprec", "--num_negatives=251"))
    (tmp_path / "file").write_text("")
    with pytest.raises(data.InputError, match="--out_dir=.*choose another"):
        train.Run(small(f"--out_dir={tmp_path / 'file' / 'x'}"))
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(
        OSError("no route")))
    with pytest.raises(data.InputError, match="not a folder, not a .gguf file"):
        train.Run(small("--init_from=nobody/nothing"))
    with pytest.raises(data.InputError, match="no such file"):
        train.Run(small(f"--init_from={tmp_path / 'none.gguf'}"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    (tmp_path / "worse.gguf").write_bytes(b"not at all")
    for name in ("bad.gguf", "worse.gguf"):
        with pytest.raises(data.InputError, match="cannot be read"):
            train.Run(small(f"--init_from={tmp_path / name}"))
    model = tmp_path / "model"
    bpe_tokenizer(pre_tokenizer_kinds()["smollm2"]).save_pretrained(model)
    with pytest.raises(data.InputError, match="cannot be read"):                 # no weights
        train.Run(small(f"--init_from={model}"))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=420, n_embd=8, n_layer=1,
                                                         n_head=2)).save_pretrained(model)
    with pytest.raises(data.InputError, match="gpt2"):
        train.Run(small(f"--init_from={model}"))


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    tok = bpe_tokenizer(pre_tokenizer_kinds()["smollm2"])
    from tokenizers import normalizers
    tok.backend_tokenizer.normalizer = normalizers.Lowercase()
    tok.save_pretrained(tmp_path)
    with pytest.raises(data.InputError, match="does not give 'Heat.*' back"):
        model_tokenizer(str(tmp_path), None, ["sun\n", "Heat\n"])


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    w.add_block_count(1), w.add_context_length(8), w.add_embedding_length(8)
    w.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    with pytest.raises(data.InputError, match="cannot be read"):
        train.Run(train.configure([*SMALL, f"--out_dir={tmp_path}",
                                   f"--init_from={tmp_path / 'x.gguf'}"]))


def test_out_of_memory_and_disk_errors_are_one_line(monkeypatch, capsys):
    for error, want in ((torch.OutOfMemoryError("CUDA out of memory.\nmore"), "--eval_batch"),
                        (OSError(28, "No space left on device", "out/x"), "out/x: No space left")):
        def fail(_):
            raise error
        monkeypatch.setattr(train, "main", fail)
        assert train.cli([]) == 2
        said = capsys.readouterr().err
        assert want in said and said.count("\n") == 1


# ---------------------------------------------------------------------- a GPU, pretended

class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0, and is computed on the CPU (`inner`). To torch's own C++
    it is on the device "meta", which has no numbers: nothing but `on_its_device` can compute it.
    """
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta", requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: torch.device("cuda", 0))
    is_meta, is_cuda = property(lambda self: False), property(lambda self: True)
    data = property(lambda self: torch.Tensor.data.__get__(self),
                    lambda self, x: (torch.Tensor.data.__set__(self, x),
                                     setattr(self, "inner", x.inner)))
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, x):
        return torch.tensor(x, dtype=self.dtype, device="cuda")

    def __format__(self, form):
        return format(self.item(), form)

    def __reduce_ex__(self, protocol):          # torch.save keeps numbers, map_location finds them
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), options=None):
        return on_its_device(op, args, options or {})


def on_its_device(op, args, options):
    """Run an operation where its tensors are; one that finds them on both devices raises, as CUDA
    would. Indices may come from the CPU, and so may single numbers.
    """
    aten = torch.ops.aten
    tensors = torch.utils._pytree.tree_leaves((args, options))
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    here = [isinstance(x, OnGPU) for x in tensors]
    if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        tensors = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)]
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, OnGPU) and x.dim()]
    if any(here) and strangers and op.overloadpacket not in (aten._to_copy, aten.copy_):
        raise RuntimeError(f"{op}: some tensors are on cuda:0, but on the CPU are {strangers}")
    goes_to = torch.device(options.get("device") or ("cuda" if any(here) else "cpu")).type
    if options.get("device") is not None:
        options = options | {"device": torch.device("cpu")}
    bare = torch.utils._pytree.tree_map_only(OnGPU, lambda x: x.inner, (args, options))
    out = op(*bare[0], **bare[1])
    if op.overloadpacket is aten.copy_:
        return args[0]
    if goes_to == "cpu" or not any(here) and tensors and "device" not in options:
        return out
    out = torch.utils._pytree.tree_map_only(torch.Tensor, OnGPU, out)
    return torch.utils._python_dispatch.return_and_correct_aliasing(op, args, options, out) \
        if any(here) else out


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch as if a GPU with bfloat16 were here: slow, and its numbers are the CPU's."""
    class Everywhere(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), options=None):
            return on_its_device(op, args, options or {})

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)
    cuda = dict(_lazy_init=None, is_available=True, get_device_name="a pretended GPU",
                get_device_capability=(8, 0), max_memory_allocated=0, synchronize=None,
                get_rng_state=torch.zeros(8, dtype=torch.uint8), set_rng_state=None)
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e12)    # a GPU's sizes take a minute
    # what this torch, built without CUDA, would refuse before it comes to `on_its_device`
    named = lambda d: torch.device("cuda", 0) if str(d) == "cuda" else d
    to, where = torch.Tensor.to, torch.where

    def made(own):
        return lambda x, dtype=None, device="cpu": own(x, dtype=dtype).to(device)

    def chosen(c, *xs):
        return where(c, *(x if isinstance(x, torch.Tensor) else torch.full((), x, device=c.device)
                          for x in xs))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: to(
        x, *map(named, a), **{key: named(v) for key, v in k.items()}))
    monkeypatch.setattr(torch, "tensor", made(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made(torch.as_tensor))
    monkeypatch.setattr(torch, "where", chosen)
    monkeypatch.setattr(torch.Tensor, "where", lambda x, c, other: chosen(c, x, other))
    with Everywhere():
        yield


def test_a_pretended_gpu_refuses_what_cuda_would(pretended_gpu):
    x = torch.arange(3., device="cuda")
    assert (x.device.type, x.cpu().device.type) == ("cuda", "cpu")
    assert (x * 2)[torch.tensor([2, 0])].tolist() == [4, 0]
    for mixed in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]),
                  lambda: x.gather(0, torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="cuda:0"):
            mixed()


@pytest.mark.parametrize("options", [[], ["--method=ufo-mix", "--search=best-first"],
                                     ["--sft_full=True", "--dropout=.1", "--recompute=True",
                                      "--dtype=float32"]])
def test_nothing_of_a_run_is_left_behind_on_the_cpu(tmp_path, pretended_gpu, capsys, monkeypatch,
                                                    options):
    tiny = ["--max_users=40", "--eval_users=12", "--vocab_users=4", "--pretrain_iters=2",
            "--sft_iters=3", "--eval_every=2", "--rounds=2", "--round_iters=2", "--branches=2",
            "--num_negatives=2", "--batch_size=4", "--rerank=True", "--compile=False",
            "--save_every=0"]
    with monkeypatch.context() as m:
        m.setattr(train.Run, "correct", lambda run, *_: setattr(run, "stop", True) or run.breathe())
        assert train.cli([f"--out_dir={tmp_path}", *tiny, *options]) == 130
    assert train.cli([f"--out_dir={tmp_path}", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "a pretended GPU" in out and "ufo-2" in out
    assert recommend.main([f"--out_dir={tmp_path}", "--user=0"]) is None
    assert "share of" in capsys.readouterr().out
    run = train.trained(tmp_path)
    one_pass = [] if "--search=best-first" in options else [0]
    assert [run.search_width(n, over) for n, over in ((1, "trie"), (10 ** 6, "trie"), (1, "vocab"))
            ] == [*one_pass, *[8] * (3 - len(one_pass))]


def test_a_cpus_run_goes_on_on_a_pretended_gpu(tmp_path, request, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train.Run, "correct", lambda run, *_: setattr(run, "stop", True) or run.breathe())
        assert train.cli([*SMALL, "--compile=False", f"--out_dir={tmp_path}"]) == 130
    request.getfixturevalue("pretended_gpu")
    assert train.cli([f"--out_dir={tmp_path}", "--resume", "--recompute=True"]) == 0


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ufo"}))
def test_every_method_runs(tmp_path, method):
    cfg = train.configure(["--method=" + method, *SMALL[:-4], "--rounds=1", "--max_users=30",
                           "--num_negatives=3", "--branches=2", f"--out_dir={tmp_path}"]
                          if method != "rerank" else ["--method=rerank", *SMALL[:4],
                                                      "--max_users=30", f"--out_dir={tmp_path}"])
    train.main(cfg)
    rows = {r["stage"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert ("sft+rerank" if method == "rerank" else "ufo-1") in rows
    assert rows["sft"]["less_sft"]["HR@10"] == [0, 0, 0]
    assert rows["sft"]["log_loss"] < 9
    if method == "rerank":
        assert rows["sft+rerank"]["MGU@10"] < rows["sft"]["MGU@10"]


def test_grid_goes_on_where_it_was_and_makes_the_table(tmp_path, capsys, monkeypatch):
    small = [*SMALL[:4], "--rounds=1", *SMALL[5:6], "--max_users=30", "--branches=2",
             "--num_negatives=2", f"--grid_dir={tmp_path}"]
    args = ["--methods=ufo,rerank", "--seeds=0,1", *small]
    calls = []

    def in_process(command, log):
        calls.append(command[2:])
        return train.cli(command[2:])
    monkeypatch.setattr(grid, "launch", in_process)
    assert exit_code(grid.main, args) == 0 and len(calls) == 4
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert [x.split("|")[1].strip() for x in lines] == ["method", "---", "sft", "rerank", "ufo",
                                                        "ufo, last round"]
    rows = [json.loads((tmp_path / "toy" / f"ufo-{s}" / "results.json").read_text())
            for s in (0, 1)]
    hr = [next(r["HR@10"] for r in x["rows"] if r["stage"] == x["chosen"]) for x in rows]
    assert f"| {np.mean(hr):.4f} ± {np.std(hr, ddof=1):.4f} |".replace(" 0.", " .") in lines[-2]
    (tmp_path / "toy" / "ufo-1" / "results.json").unlink()
    assert exit_code(grid.main, args) == 0 and len(calls) == 5 and "--seed=1" in calls[-1]
    assert any(a.startswith("--sft_from=") for a in calls[1])
    assert exit_code(grid.main, ["--table", f"--grid_dir={tmp_path}"]) == 0 and len(calls) == 5
    assert exit_code(grid.main, [*args, "--methods=ufo+gamma=0.1", "--seeds=0",
                     f"--save={tmp_path}/r/toy.json"]) == 0 and len(calls) == 6
    found = json.loads((tmp_path / "r" / "toy.json").read_text())
    assert found["ufo+gamma=0.1-0"]["config"]["gamma"] == 0.1 and len(found) == 5
    assert len(report.table(found).splitlines()) == 8
    for bad, why in (("--methods=uffo", "did you mean ufo"), ("--seeds=a", "whole numbers"),
                     ("--seed=1", "has --methods, --seeds"), ("--methods=ufo+seed=1", "cell's own"),
                     ("--methods=ufo+sft_iters=9", "give it to all"),
                     ("--methods=ufo+gama=1", "did you mean gamma"),
                     ("--topk=5", "topk was 10")):
        assert exit_code(grid.main, [bad, f"--grid_dir={tmp_path}"]) == 2
        assert why in capsys.readouterr().err


def test_a_game_on_another_runs_sft_is_that_runs_game(tmp_path, capsys):
    base = ["--max_users=40", *SMALL[:4], "--rounds=1", "--branches=2", "--round_iters=2"]
    first, again, other = (tmp_path / x for x in "abc")
    game = ["--rounds=1", "--branches=2", "--round_iters=2"]
    train.main(train.configure([*base, f"--out_dir={first}"]))
    train.main(train.configure([f"--sft_from={first}", *game, f"--out_dir={again}"]))
    read = lambda folder: json.loads((folder / "results.json").read_text())
    assert read(first) == read(again)
    # other groups and another game, on the same SFT
    train.main(train.configure([f"--sft_from={first}", *game, "--group_by=popularity",
                                "--method=dpo", f"--out_dir={other}"]))
    sft = [next(r for r in read(x)["rows"] if r["stage"] == "sft") for x in (first, other)]
    assert sft[0]["HR@10"] == sft[1]["HR@10"] and sft[0]["E"] != sft[1]["E"]
    assert read(other)["origins"]["groups"][0] == "top 20%" and read(other)["config"]["alpha"] == 0
    capsys.readouterr()
    for args, why in (([f"--out_dir={other}", "--history=3"], "history was"),
                      ([f"--out_dir={first}"], "an --out_dir of its own"), ([], "of its own")):
        assert train.cli([f"--sft_from={first}", *args]) == 2
        assert why in capsys.readouterr().err
    assert train.cli([f"--sft_from={tmp_path}", f"--out_dir={other}"]) == 2
    assert "no whole sft.pt" in capsys.readouterr().err


def test_trials_play_on_a_runs_sft(tmp_path, capsys):
    game = ["--rounds=1", "--branches=2", "--round_iters=4", "--lr=0.01"]
    train.main(train.configure(["--max_users=40", "--vocab_users=0", *SMALL[:4], *game,
                                f"--out_dir={tmp_path}"]))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    low = next(r for r in rows if r["stage"] == "ufo-1")["less_sft"]["MGU@10"][1]
    assert low
    mean = re.escape(f"{low:+.4f}")
    for trial, said in (("average", f"mean 1-1 test, less SFT: .*MGU@10 .*{mean}"),
                        ("unseen", "ufo-1 unseen: MGU@10 .*\n.*less SFT: .*\n.*less rerank: HR")):
        capsys.readouterr()
        args = [trial, f"--sft_from={tmp_path}", f"--out_dir={tmp_path / trial}", *game]
        assert exit_code(trials.main, *args) == 0
        assert re.search(said, capsys.readouterr().out), trial
        assert exit_code(trials.main, *args, "--resume") == 2       # no trial goes on in its middle
        assert not list((tmp_path / trial).glob("checkpoint*"))
    run = trials.Unseen(train.configure([*args[1:-1], "--rounds=1", "--target=equal"]))
    assert np.allclose(run.seen(run.measure("sft", "val"))["E_star"], 1 / len(run.ds.groups))
    assert exit_code(trials.main, "unseen", f"--out_dir={tmp_path / 'x'}") == 2
    assert "give --sft_from=DIR" in capsys.readouterr().err
    other = tmp_path / "more"
    train.main(train.configure([f"--sft_from={tmp_path}", f"--out_dir={other}", "--method=sft-more",
                                *game]))
    its = json.loads((other / "results.json").read_text())["rows"]
    at = [next(r for r in x if r["stage"] == "ufo-1")["MGU@10"] for x in (rows, its)]
    assert at[0] != at[1] and exit_code(trials.main, "versus", tmp_path, other) == 0
    assert re.search(re.escape(f"test, less {other}: ") + ".*MGU@10 "
                     + re.escape(f"{at[0] - at[1]:+.4f}"), capsys.readouterr().out)
    bands = tmp_path / "bands"
    train.main(train.configure([f"--sft_from={tmp_path}", f"--out_dir={bands}", "--rounds=0",
                                "--group_by=popularity"]))
    row, = [r for r in json.loads((bands / "results.json").read_text())["rows"]
            if r["stage"] == "sft"]
    capsys.readouterr()
    assert exit_code(trials.main, "versus", bands, tmp_path) == 0
    own = capsys.readouterr().out
    assert f"MGU@10 {row['MGU@10']:.4f}" in own
    assert exit_code(trials.main, "versus", bands, tmp_path, "--group_by=popularity") == 0
    differ = lambda text: re.findall("less .*", text)
    assert differ(capsys.readouterr().out) == differ(own)       # the first's groups, both times
    assert exit_code(trials.main, "versus", tmp_path, bands, "--group_by=popularity") == 0
    turned = capsys.readouterr().out
    fell, rose = (float(re.search("test, less .*MGU@10 (.{7})", x)[1]) for x in (own, turned))
    assert fell == -rose != 0
    for args in ([tmp_path], [tmp_path, other, "--topk=5"], [tmp_path, other, "--group_by=size"]):
        assert exit_code(trials.main, "versus", *args) == 2
    saved = torch.load(other / "model.pt", weights_only=True)
    for changed, why in ((dict(holdout=2), "not the same --holdout"),
                         (dict(gone=1), "more: begun with an option gone")):
        torch.save(saved | {"config": saved["config"] | changed}, other / "model.pt")
        assert exit_code(trials.main, "versus", tmp_path, other) == 2
        assert why in capsys.readouterr().err


def test_an_sft_that_could_not_be_kept_is_not_made_of_the_game(tmp_path, monkeypatch):
    """sft.pt is missing and the run goes on in a round: what is there now is no SFT."""
    write = machine.write_checkpoint
    monkeypatch.setattr(machine, "write_checkpoint", lambda folder, content, stem="checkpoint":
                        stem != "sft" and write(folder, content, stem))
    with monkeypatch.context() as m, pytest.raises(KeyError):
        m.setattr(train.Run, "correct", lambda run, *_: run.save() and {}["stopped"])
        train.main(train.configure([*SMALL, "--max_users=30", "--vocab_users=0",
                                    f"--out_dir={tmp_path}"]))
    monkeypatch.undo()
    train.main(train.configure(["--resume", f"--out_dir={tmp_path}"]))
    assert (tmp_path / "results.json").exists() and not (tmp_path / "sft.pt").exists()


def test_the_chosen_round_is_the_one_that_is_kept(tmp_path, monkeypatch):
    base = ["--max_users=40", *SMALL[:4], "--branches=2", "--round_iters=2", "--rounds=2"]
    monkeypatch.setattr(report, "choose", lambda rows, k: rows[min(1, len(rows) - 1)]["stage"])
    a, b = tmp_path / "a", tmp_path / "b"
    train.main(train.configure([*base, f"--out_dir={a}"]))
    train.main(train.configure([f"--sft_from={a}", "--rounds=1", "--branches=2", "--round_iters=2",
                                f"--out_dir={b}"]))
    saved = [torch.load(x / "model.pt", weights_only=True)["tuned"] for x in (a, b)]
    assert json.loads((a / "results.json").read_text())["chosen"] == "ufo-1"
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "toy-0"
    train.main(train.configure(["--max_users=40", *SMALL[:4], "--rounds=1", "--branches=2",
                                "--round_iters=2", f"--out_dir={out}"]))
    assert (out / "exposure.png").read_bytes()[1:4] == b"PNG"
    run = json.loads((out / "results.json").read_text())
    other = run | {"config": run["config"] | {"group_by": "popularity"}}
    found = {"ufo-0": run, "ufo-1": run, "ufo+gamma=0.1-0": run,
             "ufo+group_by=popularity+rerank=True-0": other}
    assert report.complete(found, "") == {"ufo": {"0": run, "1": run}}
    assert report.complete(found, "+group_by=popularity") == {
        "ufo+group_by=popularity": {"0": other}}
    longer = {"ufo+rounds=6-0": run, "ufo+rounds=9-0": other}
    assert report.complete(longer, "") == {"ufo": {"0": run}}
    assert report.complete(found | {"ufo+rounds=6-0": other}, "")["ufo"]["0"] is run
    report.save(found, tmp_path / "toy.json")
    report.main(tmp_path / "toy.json")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        f"toy-{x}{of}.png" for x in ("judger", "tradeoff") for of in ("-group_by-popularity", "")]
    report.main(out / "results.json")
    (tmp_path / "bench.json").write_text('{"sft": {"ratio": 2}, "hardware": {}}')
    with pytest.raises(data.InputError, match="name a run's folder"):
        report.main(tmp_path / "bench.json")
    with pytest.raises(data.InputError, match="name a run's folder"):
        report.main(tmp_path / "no.json")


def test_a_table_says_where_sft_was_kept_and_prints_whole_numbers():
    row = lambda stage, x: {"stage": stage, "coverage": x, "log_loss": 10 * x,
                            **{f"{m}@10": x for m in ("HR", "NDCG", "MGU", "DGU")},
                            "less_sft": {f"{m}@10": [x - 1, -1.5, 10.5] for m in ("HR", "NDCG",
                                                                                 "MGU")}}
    config = {"topk": 10, "method": "spin", "rounds": 1, "rerank": False, "group_by": "genre"}
    found = {f"spin-{s}": {"config": config | {"seed": s}, "chosen": chosen,
                           "rows": [row("sft", 1.0), row("ufo-1", 1.25)]}
             for s, chosen in enumerate(("sft", "ufo-1"))}
    cells = [[c.strip() for c in x.split("|")] for x in report.table(found).splitlines()]
    assert [x[1] for x in cells[2:]] == ["sft", "spin", "spin, last round"]
    assert [x[2] for x in cells[2:]] == ["2", "2, SFT in 1", "2"]
    assert cells[2][8] == "10.0000 ± .0000" and cells[4][3] == "1.2500 ± .0000"
    assert cells[4][9] == "+.2500 ± .0000 [-1.5000, +10.5000]"
    # the same cell re-ranked in one seed alone: no seed twice, a row of what there is
    more = found["spin-0"] | {"config": config | {"rerank": True}, "rows": [
        row(stage, 2.0) | {"less_rerank": row("", 1.5)["less_sft"]}
        for stage in ("sft", "ufo-1", "sft+rerank", "ufo-1+rerank")]}
    other = more | {"config": more["config"] | {"target": "equal"}}
    lines = report.table(found | {"spin+rerank=True-0": more,
                                  "dpo+target=equal+rerank=True-0": other}).splitlines()
    cells = [[c.strip() for c in x.split("|")] for x in lines if x.startswith("|")][2:]
    assert [x[1:4] for x in cells] == [
        ["sft+target=equal", "1", "2.0000"], ["sft", "2", "1.5000 ± .7071"],
        ["rerank+target=equal", "1", "2.0000"], ["rerank", "1", "2.0000"],
        ["dpo+target=equal", "1, SFT in 1", "2.0000"],
        ["dpo+target=equal, last round", "1", "2.0000"],
        ["dpo+target=equal, then rerank", "1", "2.0000"],
        ["spin", "2, SFT in 1", "1.6250 ± .5303"], ["spin, last round", "2", "1.6250 ± .5303"],
        ["spin, then rerank", "1", "2.0000"]]
    assert lines[-1].startswith("spin, last round, less rerank: HR@10 +.5000 [-1.5000, +10.5000]")
    assert report.kept("sft", 3) == "ufo-3" and report.kept("sft", 0) == "sft"
    assert report.kept("ufo-1", 3) == "ufo-1"


def test_the_round_is_chosen_by_validation():
    row = lambda stage, high, mgu: {"stage": stage, "MGU@10": mgu,
                                    "less_sft": {"NDCG@10": [-0.01, -0.03, high]}}
    rows = [row("sft", 0.0, 0.05), row("ufo-1", 0.001, 0.02), row("ufo-2", -0.001, 0.01)]
    assert report.choose(rows, 10) == "ufo-1" and report.choose(rows[:1], 10) == "sft"


def test_a_cpu_that_is_slow_in_bfloat16_is_called_so(monkeypatch, capsys):
    cfg = train.configure(["--dtype=bfloat16", "--device=cpu"])
    for seconds, said in ((9, True), (0.5, False)):
        monkeypatch.setattr(machine, "in_turns", lambda *_: [[2, 1], [3 * seconds, seconds]])
        machine.choose_device(cfg)
        assert ("9 times slower in bfloat16" in capsys.readouterr().out) == said


def test_float16_leaves_out_overflowing_steps_and_counts_them(tmp_path):
    run = train.Run(train.configure([*SMALL, "--dtype=float16", "--device=cpu",
                                     f"--out_dir={tmp_path}"]))
    before = [p.detach().clone() for p in run.params]
    run.step(run.params[0].sum() * 1e35)            # finite, but not times the scale of 65,536
    assert run.state["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.params))
    run.step(run.params[0].sum())
    assert run.state["skipped"] == 1 and not torch.equal(before[0], run.params[0])


def test_collapse_is_called_out(tmp_path, capsys):
    run = train.Run(train.configure([*SMALL, f"--out_dir={tmp_path}"]))
    run.enter("sft")
    sft = run.measure("sft", "val")
    assert not sft["collapsed"]
    sft["coverage"] = 0.99
    assert run.measure("sft", "val", stage="ufo-1")["collapsed"]
    assert "COLLAPSED" in capsys.readouterr().out


def test_memory_does_not_grow_from_round_to_round(tmp_path):
    """Tensors alive after rounds 2 and 4, but for the chosen round's copy, of which there is at
    most one.
    """
    run = train.Run(train.configure([*SMALL, "--max_users=20", f"--out_dir={tmp_path}"]))
    run.enter("sft")
    E_pre, alive = np.array(run.measure("pretrained", "val")["E"]), []
    run.measure("sft", "val")
    run.enter("game")
    for t in range(1, 5):
        run.round(t, E_pre)
        run.state["best"] = None
        gc.collect()
        alive.append(sum(x.numel() for x in gc.get_objects()
                         if type(x) in (torch.Tensor, torch.nn.Parameter)))
    assert alive[3] <= alive[1]


def test_recomputing_blocks_changes_nothing():
    model, x = random_model(50).freeze(), torch.randint(50, (2, 9))
    model.add_adapter("a", 4)
    for p in model.use("a").adapter_parameters("a"):
        torch.nn.init.normal_(p, std=0.2)
    grads = []
    for model.recompute in (False, True):
        grads.append(torch.autograd.grad(model(x).sum(), model.adapter_parameters("a")))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def readme_block(begins):
    """The code block of the README that begins so."""
    text = (Path(__file__).parent / "README.md").read_text()
    found = [b for b in text.split("```python\n")[1:] if b.startswith(begins)]
    assert len(found) == 1, begins
    return found[0].split("```")[0]


def test_the_readmes_own_experiment_runs(tmp_path, monkeypatch, capsys):
    """"A new fairness experiment in 20 lines", as printed, on ML-1M's layout."""
    ml1m(tmp_path / "data" / "ml-1m")
    code = readme_block("# experiment.py")
    assert len([x for x in code.splitlines() if x.strip()]) <= 20
    shorter = ["--init_from=scratch", "--pretrain_iters=2", "--sft_iters=2", "--rounds=1",
               "--round_iters=2", "--batch_size=2", "--branches=2", "--num_negatives=2", "--topk=3",
               f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--dim=32",
               "--n_heads=4", "--n_layers=1"]
    monkeypatch.setattr(data, "fetch_model", lambda *a: (str(tmp_path), None, "test"))
    bpe_tokenizer(pre_tokenizer_kinds()["smollm2"]).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["experiment.py", "--dataset=ml1m", *shorter])
    tables = (data.GROUPINGS, judger.TARGETS, corrector.LOSSES)
    before = [dict(t) for t in tables]
    try:
        with pytest.raises(SystemExit) as done:
            exec(compile(code, "experiment.py", "exec"), {"__name__": "__main__"})
    finally:
        for table, old in zip(tables, before):
            table.clear(), table.update(old)
    assert done.value.code == 0
    r = json.loads((tmp_path / "out" / "results.json").read_text())
    assert r["origins"]["groups"] == ["1950s", "1980s", "1990s"]
    assert r["origins"]["E_star"] == pytest.approx([1 / 3] * 3)
    assert r["config"]["loss"] == "hinge"
    # where its names are not known it is one line
    assert exit_code(recommend.main, [f"--out_dir={tmp_path / 'out'}", "--user=1"]) == 2
    assert "--group_by=decade: not known" in capsys.readouterr().err


def test_command_line_errors_are_one_line_and_exit_2(tmp_path):
    run = subprocess.run([sys.executable, "train.py", "--rouns=3"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip().count("\n") == 0 and "rounds" in run.stderr
