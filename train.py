"""nanoUFO: pretrain -> SFT -> self-play, and the table of what each did to accuracy and fairness.

    python train.py                     the toy world, CPU, two to five minutes
    python train.py --dataset=ml100k    SmolLM2-135M on MovieLens-100K (ml1m: MovieLens-1M); one GPU

Options are --key=value over config.py's Config. Equation numbers are those of the README.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

# before torch is loaded: a CPU's threads that wait for each other soon sleep, or one other busy
# program would slow a run tenfold
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch

import corrector
import data
import judger
import machine
import metrics
import report
import selfplay
from catalog import (Catalog, draw_places, item_tokenizer, model_tokenizer, pad, training_batches,
                     word_tokenizer)
from config import MEASURED, Config, check, configure, exit_code
from model import Model, ModelConfig, describe, load

COLLAPSE = 0.5      # under this share of SFT's coverage a policy is called collapsed
PRETRAIN, SFT, GAME, BRANCHES = range(4)        # streams of random numbers, one for each purpose


def key_of(stage, split, over="trie"):
    """What was measured of a stage stands under this in state["measured"]."""
    return f"{stage} {split} {over}"


class Policies:
    """The three policies by name, over one frozen base: policies("pretrained" | "sft" | "player")
    -> the model, switched.

    `tuned` is the base itself, carrying the adapters "sft" and "player". Only with sft_full is it a
    second model (a copy that SFT trains whole, then frozen in its turn; its "player" adapter starts
    at zero, which is the SFT model). Policies share modules, and a call switches the adapter: be
    done with one policy before asking for the next.
    """

    def __init__(self, base, full):
        self.base, self.full = base, full
        self.tuned = copy.deepcopy(base) if full else base

    def __call__(self, name):
        model = self.base if name == "pretrained" else self.tuned
        return model.use(None if name == "pretrained" or (self.full and name == "sft") else name)


class Run(machine.Resumable):
    """What the stages share: configuration, data, catalog, policies, the log, and `state`, which
    says how far the run is. One instance a run.

    Stages follow one another: "pretrain", "sft", "game". Everything drawn comes from generators
    seeded by (seed, what for, which step or round), but dropout and the start of adapters, which
    come from torch's own; so (state, weights, optimizer, torch's random state) is all that a
    checkpoint holds, and a run that goes on from one ends as if it had never stopped.
    """

    def __init__(self, cfg, begin=True):
        """begin=False: only what a trained model needs (see `trained`)."""
        self.cfg, self.start = cfg, time.time()
        self.device, self.dtype = machine.choose_device(cfg)
        on_gpu = self.device.type == "cuda"
        self.compile = cfg.compile == "True" or (cfg.compile == "auto" and on_gpu
                                                 and machine.has_compiler())
        self.multiple = 8 if on_gpu else 1                 # rows are padded to a multiple of it
        torch.manual_seed(cfg.seed)
        self.ds = ds = data.load_dataset(cfg.dataset, cfg.data_dir, cfg.group_by, cfg.holdout,
                                         cfg.max_users, cfg.seed, cfg.header)
        if cfg.topk >= len(ds.titles):
            raise data.InputError(f"--topk={cfg.topk}: the catalog has {len(ds.titles)} titles")
        if cfg.negatives == "top" and cfg.num_negatives > len(ds.titles):
            raise data.InputError(f"--num_negatives={cfg.num_negatives}: the catalog has "
                                  f"{len(ds.titles)} titles to take the top from")
        self.base, self.tokenizer, self.source = self.build()
        self.catalog = Catalog(ds.titles, ds.header, self.tokenizer, cfg.history)
        self.catalog.trie.to(self.device)
        self.base.compute_dtype = self.dtype
        if cfg.init_from != "scratch":      # 16 bits before it goes to a card
            self.base.freeze()
        self.base.to(self.device)
        self.cases = {split: data.spaced(ds.cases(split), cfg.eval_users)
                      for split in ("val", "test")}
        n = sum(map(len, ds.histories))
        print(f"{cfg.dataset}: {len(ds.users)} users, {len(ds.titles)} titles, {n} ratings, "
              f"{len(ds.groups)} groups by {cfg.group_by}; "
              f"{self.catalog.lengths.mean():.1f} tokens a title, "
              f"{(self.catalog.trie.modes['trie'].step_node >= 0).sum(1).float().mean():.1f} of "
              f"them choices")
        print(f"model: {describe(self.base)}, from {self.source}; tokens: {self.tokenizer.name}")
        self.state = {
            "stage": "", "it": 0,           # steps of the stage, or of the round, that are made
            "measured": {},                 # rows by `key_of`
            "looks": [],                    # [step, validation NDCG] in SFT
            "best": None,                   # weights of SFT's best look; then of the chosen round
            "round": 1, "log_v": [0.0] * len(ds.groups),
            "played": None,                 # the round's made-up items, once there are any
            "losses": [], "right": [],      # of the round's steps
            "rounds": [], "skipped": 0, "minutes": 0.0}
        if begin:
            self.begin(Path(cfg.out_dir))

    # ------------------------------------------------------------------ where it is, and going on

    def begin(self, out):
        """Begin in the folder `out`, go on from its checkpoint, or after the SFT of --sft_from."""
        own = checkpoint = self.open(out)
        if not own and self.cfg.sft_from:
            checkpoint = machine.read_checkpoint(Path(self.cfg.sft_from), "sft")
        if not checkpoint:
            if self.cfg.resume:
                print(f"nothing to go on with in {out}: starting from the beginning")
            self.enter("pretrain")
            return
        for stage in ("pretrain", "sft", "game"):
            self.enter(stage)
            if stage == checkpoint["state"]["stage"]:
                break
        self.check_made_of(checkpoint["made_of"], out if own else self.cfg.sft_from)
        fresh, self.state = self.state, self.state | checkpoint["state"]
        self.load_weights(checkpoint)
        if own:
            self.opt.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:                # none, if it was begun without float16
                self.scaler.load_state_dict(checkpoint["scaler"])
        elif any(checkpoint["config"][k] != getattr(self.cfg, k) for k in MEASURED):
            self.state |= {"measured": {}, "log_v": fresh["log_v"]}
        self.go_on(checkpoint)

    def made_of(self):
        """[base model, titles, interactions]: a run must not go on with others."""
        titles = "\n".join(self.ds.titles).encode()
        return [self.source, f"{len(self.ds.titles)} titles (CRC {zlib.crc32(titles):08x})",
                f"{sum(map(len, self.ds.histories))} interactions"]

    def check_made_of(self, made_of, whose):
        """InputError unless all of `made_of` is here; another revision of the base is only said."""
        made_of, here = [str(x) for x in made_of], self.made_of()[:len(made_of)]
        if any(a.partition("@")[0] != b.partition("@")[0] for a, b in zip(made_of, here)):
            raise data.InputError(f"{whose} was made of {', '.join(made_of)}; here is "
                                  f"{', '.join(here)}: give it the same --data_dir and model")
        if made_of != here:
            print(f"! {whose} was made on {made_of[0]}, here is {here[0]}: the weights may differ")

    def weights(self):
        """What this run has trained or drawn, to be saved: all weights from scratch, else the
        adapters.
        """
        keep = lambda model: {k: v for k, v in model.state_dict().items()
                              if self.cfg.init_from == "scratch" or "lora_" in k}
        tuned = self.policies.tuned if self.state["stage"] != "pretrain" else self.base
        return {"tuned": keep(tuned), "base": {} if tuned is self.base else keep(self.base)}

    def load_weights(self, saved):
        tuned = self.policies.tuned if self.state["stage"] != "pretrain" else self.base
        for model, state in ((tuned, saved["tuned"]), (self.base, saved["base"])):
            if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
                raise data.InputError(f"{self.cfg.out_dir}: its weights do not fit: {unknown[0]}")

    def enter(self, stage):
        """Make ready for a stage: what is frozen, what trains, its optimizer."""
        cfg = self.cfg
        if stage == "pretrain":
            params, lr = list(self.base.parameters()), cfg.pretrain_lr
        elif stage == "sft":
            self.policies = Policies(self.base.freeze(), cfg.sft_full)
            tuned, lr = self.policies.tuned, cfg.sft_lr
            tuned.recompute = cfg.recompute
            if self.compile:
                tuned.compile_blocks()
            if cfg.sft_full:
                params = [p.requires_grad_() for p in tuned.parameters()]
                for p in params:
                    p.data = p.data.float()
            else:
                tuned.add_adapter("sft", cfg.lora_rank)
                params = tuned.adapter_parameters("sft")
        else:
            tuned, lr = self.policies.tuned.freeze(), cfg.lr
            tuned.add_adapter("player", cfg.lora_rank, like=None if cfg.sft_full else "sft")
            params = tuned.adapter_parameters("player")
        self.state |= {"stage": stage, "it": 0}
        self.params = params
        # AdamW over float32 parameters (matrices decay, vectors do not), and the scaler that
        # float16 needs
        groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
                  {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        self.opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def build(self):
        """-> (model in float32 on the CPU, tokenizer, where it came from)."""
        cfg, ds = self.cfg, self.ds
        lines = [t + "\n" for t in ds.titles]
        if cfg.init_from == "scratch":
            if cfg.tokens == "items":
                tok = item_tokenizer(ds)
            else:
                texts = lines + [ds.header] + ds.corpus
                if cfg.dataset == "toy":
                    raw = word_tokenizer(texts)
                else:               # the tokens of the pretrained model it stands beside
                    folder, gguf, _ = data.fetch_model(Config.init_from, cfg.data_dir)
                    raw = model_tokenizer(folder, gguf, texts)
                tok = raw.compact(texts)
            c = ModelConfig(tok.vocab_size, dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads,
                            n_kv_heads=cfg.n_heads // 2 if cfg.n_heads % 2 == 0 else cfg.n_heads,
                            head_dim=cfg.dim // cfg.n_heads, ffn_dim=8 * cfg.dim // 3,
                            dropout=cfg.dropout)
            return Model(c), tok, "scratch"
        folder, gguf, source = data.fetch_model(cfg.init_from, cfg.data_dir)
        try:
            tok = model_tokenizer(folder, gguf, lines + [ds.header])
            return load(folder, gguf), tok, source
        except data.InputError:
            raise
        except Exception as e:      # transformers' and gguf's own errors, which share no parent
            why = str(e).partition("\n")[0]
            raise data.InputError(f"init_from={cfg.init_from}: cannot be read "
                                  f"({type(e).__name__}: {why})") from None

    def batches(self, what, start):
        """Endless batches of training windows, drawn from the stream `what`, from the batch `start`
        on.
        """
        cfg, users = self.cfg, data.evenly(len(self.ds.users), self.cfg.train_users)
        return itertools.islice(training_batches(
            [self.ds.train(u) for u in users], cfg.sft_window, cfg.batch_size, self.catalog.lengths,
            np.random.default_rng([cfg.seed, what])), start, None)

    def search_width(self, rows, over="trie"):
        """How many prefixes `Search.top_k` runs at a time: 8, about a quarter of what it runs for a
        user. 0: the whole catalog in one pass, which a GPU does sooner than it waits for several,
        as long as the pass is small (16,384 decisions; an estimate). Over the vocabulary, where
        every node is a decision and has a row of all its logits, one pass would fill any card.
        """
        if over == "vocab":
            return 8
        nodes = int(self.catalog.trie.modes["trie"].decision.sum())
        one_pass = self.device.type == "cuda" and rows * nodes <= 2 ** 14
        return 0 if self.cfg.search == "catalog" or (self.cfg.search == "auto" and one_pass) else 8

    # ----------------------------------------------------------- one optimizer step, one evaluation

    def step(self, loss):
        """Backward, clip to norm 1, update -> the loss, a number. With float16 the scaler leaves a
        step out when a gradient overflows; those are counted.
        """
        scale, scaled = self.scaler.get_scale(), self.scaler.is_enabled()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.opt)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        value, norm = torch.stack([loss.detach(), norm]).tolist()   # the step waits for a GPU here
        if not math.isfinite(value) or not (scaled or math.isfinite(norm)):
            raise SystemExit(f"stopped: the loss is {value}, its gradient's norm {norm} in "
                             f"{self.where()}; the last checkpoint in {self.out} is from before "
                             f"it: lower the learning rate and start anew")
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        if scaled and self.scaler.get_scale() < scale:
            self.state["skipped"] += 1
        return value

    def search(self, policy, history, over="trie"):
        """-> a Search under the prompts that a policy gets of B histories, and what they have seen
        already, (B, I) bool.
        """
        prompt = self.catalog.prompts(history, self.device)
        seen = torch.zeros(len(history), len(self.ds.titles), dtype=torch.bool, device=self.device)
        for row, h in zip(seen, history):
            row[h] = True
        return selfplay.Search(self.policies(policy).eval(), self.catalog.trie, prompt, over), seen

    @torch.no_grad()
    def measure(self, policy, split, over="trie", stage=None, most=0):
        """Top-K lists and log-loss of a policy on the cases of a split -> metrics.report's dict,
        with the lists. Logs a line. most: of at most so many users, evenly spaced. A stage is
        measured once: a second call returns what the first found.
        """
        cfg, t0, stage = self.cfg, time.time(), stage or policy
        if (key := key_of(stage, split, over)) in self.state["measured"]:
            return self.state["measured"][key]
        user, history, target = data.spaced(self.cases[split], most)
        # like lengths together, the longest first
        size = [self.catalog.lengths[h].sum() for h in self.shown(history)]
        order = np.argsort(size, kind="stable")[::-1]
        lists, log_loss, run = np.empty((len(user), cfg.topk), int), np.empty(len(user)), 0
        for i in self.watched(range(0, len(order), cfg.eval_batch), f"{stage} {split}"):
            b = order[i:i + cfg.eval_batch]
            search, seen = self.search(policy, [history[n] for n in b], over)
            items = torch.as_tensor(target[b], device=self.device)[:, None]
            log_loss[b] = -search.score(items)[:, 0].cpu().double().numpy()
            items, _, n_run = search.top_k(cfg.topk, seen, self.search_width(len(b), over))
            lists[b], run = items.cpu().numpy(), run + int(n_run.sum())
        if np.isnan(log_loss).any():
            raise data.InputError(f"{stage}: log q is not a number in {str(self.dtype)[6:]}; use "
                                  f"--dtype=float32")
        return self.record(stage, split, over, (user, history, target), lists, log_loss,
                           run / len(user), time.time() - t0)

    def record(self, stage, split, over, cases, lists, log_loss, prefixes=0.0, seconds=0.0):
        """Report on lists (N, K) and log_loss (N,) of a stage, log and print it, keep it."""
        (user, history, target), cfg = cases, self.cfg
        row = metrics.report(self.ds.credit, user, self.shown(history), lists,
                             target, log_loss, judger.TARGETS[cfg.target])
        k = cfg.topk
        self.log(event="eval", stage=stage, split=split, over=over, prefixes=prefixes,
                 seconds=seconds, **{m: row[m] for m in row if m not in ("ci", "E", "E_star")})
        print(f"[{self.minutes():5.1f} min] {stage:>14} {split:4} {over:5} HR@{k} "
              f"{row[f'HR@{k}']:.4f}  NDCG@{k} {row[f'NDCG@{k}']:.4f}  "
              f"MGU@{k} {row[f'MGU@{k}']:.4f}  DGU@{k} {row[f'DGU@{k}']:.4f}  log-loss "
              f"{row['log_loss']:.3f}  coverage {row['coverage']:.3f}  "
              f"({prefixes:.0f} prefixes a user, {seconds:.0f} s)", flush=True)
        key, measured = key_of(stage, split, over), self.state["measured"]
        row |= {"stage": stage, "split": split, "over": over, "lists": lists.tolist(),
                "minutes": round(self.minutes(), 2), "collapsed": False}
        sft = row if stage == "sft" else measured.get(key_of("sft", split, over))
        if sft:
            row["less_sft"] = self.difference(row, sft)
        if sft and row["coverage"] < COLLAPSE * sft["coverage"]:
            row["collapsed"] = True
            self.log(event="collapsed", stage=stage, coverage=row["coverage"])
            print(f"!! COLLAPSED: the lists of {stage} cover {row['coverage']:.3f} of the catalog, "
                  f"under {COLLAPSE:.0%} of SFT's {sft['coverage']:.3f}", flush=True)
        # plain numbers and lists, as NumPy's own would have to be unpickled
        measured[key] = json.loads(json.dumps(row))
        return measured[key]

    def shown(self, history):
        """The part of every history that a prompt shows."""
        return [h[-self.cfg.history:] for h in history]

    def difference(self, row, other):
        """One measured row less another of the same split, paired by user (metrics.difference)."""
        user, history, target = self.cases[row["split"]]
        return metrics.difference(self.ds.credit, user, self.shown(history),
                                  row["lists"], other["lists"], target,
                                  judger.TARGETS[self.cfg.target])

    @torch.no_grad()
    def all_scores(self, policy, split):
        """-> log q of every title for every case of a split, and whether the user has seen it, (N,
        I) each.
        """
        history, n = self.cases[split][1], self.cfg.eval_batch
        everything, found = torch.arange(len(self.ds.titles), device=self.device), []
        for i in self.watched(range(0, len(history), n), f"{policy} {split}, all titles"):
            search, seen = self.search(policy, history[i:i + n])
            logq = search.score(everything.expand(len(seen), -1))
            found.append((logq.cpu().double().numpy(), seen.cpu().numpy()))
        return tuple(np.concatenate(x) for x in zip(*found))

    def rerank(self, policy, stage):
        """The baseline without training: a bias for every group, fitted on the validation lists of
        a policy (`judger.fit_bias`) and added to its log q on both splits.
        """
        cfg, A, beta = self.cfg, self.ds.credit, None
        if key_of(f"{stage}+rerank", "test") in self.state["measured"]:
            return
        for split in ("val", "test"):
            cases = user, _, target = self.cases[split]
            scores, seen = self.all_scores(policy, split)
            if beta is None:
                row = self.state["measured"][key_of(stage, "val")]
                beta = judger.fit_bias(np.where(seen, -np.inf, scores), A, np.array(row["E_star"]),
                                       cfg.topk)
            scores += A @ beta
            log_loss = np.logaddexp.reduce(scores, 1) - scores[np.arange(len(user)), target]
            self.record(f"{stage}+rerank", split, "trie", cases, judger.top(
                np.where(seen, -np.inf, scores), cfg.topk), log_loss)["bias"] = beta.tolist()

    # ------------------------------------------------------------------ the stages

    def pretrain(self):
        """From scratch only: plain next-token training on the corpus (the toy's web, or cards of
        the catalog), so that the model starts with a knowledge, and a bias, that the users'
        histories did not give it.
        """
        cfg, model = self.cfg, self.base
        if cfg.init_from != "scratch" or cfg.tokens != "text":
            return
        docs = [torch.tensor(list(self.tokenizer.prefix) + self.tokenizer.encode(t))
                for t in self.ds.corpus]
        for it in self.steps("pretrain", cfg.pretrain_iters):
            set_lr(self.opt, cfg.pretrain_lr, it, cfg.pretrain_iters)
            rng = np.random.default_rng([cfg.seed, PRETRAIN, it])
            batch = [docs[k] for k in rng.integers(len(docs), size=2 * cfg.batch_size)]
            length = torch.tensor([len(d) for d in batch], device=self.device)
            tokens = pad(batch, self.multiple).to(self.device)
            logits = model.train().logits(model(tokens[:, :-1]))
            real = torch.arange(1, tokens.shape[1], device=self.device) < length[:, None]
            loss = self.step(torch.nn.functional.cross_entropy(logits[real], tokens[:, 1:][real]))
            if it % 20 == 0:
                self.bar.set_postfix(loss=f"{loss:.3f}")
                self.log(event="pretrain", it=it, loss=loss)

    def look(self, it):
        """SFT's validation NDCG after `it` steps, its weights kept if it is the best -> whether
        the last `patience` looks brought nothing better.
        """
        s = self.state
        if all(at != it for at, _ in s["looks"]):
            row = self.measure("sft", "val", stage=f"sft {it}")
            score = row[f"NDCG@{self.cfg.topk}"]
            if score > max([x for _, x in s["looks"]], default=-1):
                s["best"] = copy.deepcopy(self.weights()["tuned"])
            s["looks"].append([it, score])
        scores = [x for _, x in s["looks"]]
        since = len(scores) - 1 - int(np.argmax(scores))
        return 0 < self.cfg.patience <= since

    def sft(self):
        """Maximise (1) on windows of the histories, every title but a window's first; keep the
        weights of the best validation NDCG.
        """
        cfg, policies, speed = self.cfg, self.policies, machine.Speed(self)
        batches = self.batches(SFT, self.state["it"])
        for it in self.steps("sft", cfg.sft_iters):
            if it and it % cfg.eval_every == 0 and self.look(it):
                print(f"no better validation NDCG in {cfg.patience} looks: SFT stops at step {it}")
                break
            speed.begin()
            set_lr(self.opt, cfg.sft_lr, it, cfg.sft_iters)
            model, windows = policies("sft").train(), next(batches)
            tokens, at, node, child, n = self.catalog.window_batch(windows, self.device,
                                                                   self.multiple)
            hidden = model(tokens).flatten(0, 1)[at]
            logq = selfplay.step_log_prob(model, self.catalog.trie, hidden, node, child)
            loss = self.step(-logq.sum() / n)                   # nats a title
            speed.end(policies.tuned, windows, len(at))
            if it % 10 == 0:
                self.bar.set_postfix(log_loss=f"{loss:.3f}")
                self.log(event="sft", it=it, loss=loss)
        else:
            self.look(cfg.sft_iters)
        policies.tuned.load_state_dict(self.state["best"], strict=False)
        self.state["best"], measured = None, self.state["measured"]
        if not cfg.sft_full or self.dtype == torch.float32:     # else they are rounded for the game
            # the best look was at these weights: SFT need not be measured on validation again
            it, _ = max(self.state["looks"], key=lambda look: look[1])
            row = measured[key_of(f"sft {it}", "val")]
            measured[key_of("sft", "val")] = row | {"stage": "sft",
                                                    "less_sft": self.difference(row, row)}
        print(f"[{self.minutes():5.1f} min] SFT: {speed.report()}")

    def judge(self, t, E_pre):
        """Round t's verdict on the groups: the controller (7) on the validation lists of the player
        as it stands -> what is to be logged of it, log v (G,) among it.
        """
        val = self.state["measured"][key_of(f"ufo-{t - 1}" if t > 1 else "sft", "val")]
        E_star, E_t = np.array(val["E_star"]), np.array(val["E"])
        before = self.state["log_v"] if self.cfg.accumulate else [0.0] * len(E_t)
        log_v = judger.control(np.array(before), E_star, E_t, self.cfg.gamma)
        from_pretraining, from_tuning = judger.verdict_parts(E_star, E_pre, E_t)
        g = int(log_v.argmax())
        print(f"round {t}: judge: log v from {log_v.min():+.2f} to {log_v.max():+.2f}, most "
              f"for {self.ds.groups[g]} ({log_v[g]:+.2f}; starved by {from_pretraining[g]:+.2f} "
              f"from pretraining, {from_tuning[g]:+.2f} since)")
        return {"log_v": log_v.tolist(), "from_pretraining": from_pretraining.tolist(),
                "from_tuning": from_tuning.tolist()}

    def play(self, t, windows, places):
        """Round t's made-up items with what the loss needs of them: see `selfplay.play`."""
        cfg = self.cfg
        self.policies.tuned.eval()
        generator = torch.Generator(self.device).manual_seed(1000 * cfg.seed + t)
        return selfplay.play(self.policies, self.catalog, windows, places, cfg.num_negatives,
                             cfg.temperature, max(1, cfg.eval_batch // cfg.branches), cfg.alpha,
                             functools.partial(self.watched, name="play"), generator, cfg.negatives)

    def correct(self, windows, places, weights):
        """A round's corrector steps: minimise (9) on what was played."""
        cfg, s = self.cfg, self.state
        items, logq_t, logq_sft = s["played"]
        for it in self.steps("correct", cfg.round_iters):
            b = slice(it * cfg.batch_size, (it + 1) * cfg.batch_size)
            model = self.policies("player").train(cfg.game_dropout)
            prompt = self.catalog.branches(windows[b], places[b], self.device, self.multiple)
            logq = selfplay.log_q(model, self.catalog.trie, prompt, items[b])      # (B, A, 1 + S)
            f = judger.score(logq, logq_t[b], logq_sft[b], cfg.lam, cfg.alpha).flatten(0, 1)
            loss = self.step(corrector.LOSSES[cfg.loss](f, weights[items[b, :, 0]].flatten()))
            right = judger.accuracy(f.detach())
            s["losses"].append(loss), s["right"].append(right)
            if it % 10 == 0:
                self.bar.set_postfix(loss=f"{loss:.3f}", judger=f"{np.mean(s['right']):.3f}")
                self.log(event="correct", round=s["round"], it=it, loss=loss, judger_accuracy=right)

    def round(self, t, E_pre):
        """Round t of the game: judge the groups (7) -> play -> correct (9) -> measure."""
        cfg, s, n = self.cfg, self.state, self.cfg.round_iters
        windows = [w for b in itertools.islice(self.batches(GAME, n * (t - 1)), n) for w in b]
        rng = np.random.default_rng([cfg.seed, BRANCHES, t])
        places = draw_places(windows, cfg.branches, rng)
        if s["played"] is None:
            verdict = self.judge(t, E_pre)
            played = self.play(t, windows, places)
            self.log(event="judge", round=t, **verdict)
            s |= {"log_v": verdict["log_v"], "played": played, "losses": [], "right": [], "it": 0}
        s["played"] = tuple(x.to(self.device) for x in s["played"])
        weights = torch.as_tensor(judger.item_weights(self.ds.credit, np.array(s["log_v"])),
                                  dtype=torch.float32, device=self.device)
        self.correct(windows, places, weights)
        loss, right = np.mean(s["losses"]), np.mean(s["right"])
        at_zero = (cfg.loss == "logistic" and (cfg.alpha == 1 or t == 1)
                   and not (cfg.game_dropout and cfg.dropout))
        begins = f" (from {math.log(1 + cfg.num_negatives):.3f})" if at_zero else ""
        print(f"round {t}: play and correct: loss {loss:.3f}{begins}, judger right on {right:.3f} "
              f"of pairs")
        for split in ("val", "test"):
            self.measure("player", split, stage=f"ufo-{t}")
        if self.chosen() == f"ufo-{t}":
            s["best"] = self.policies.tuned.adapter_state("player")
        # what the opponent's samples, rather than its lists, show of each group beside the truth
        E = [metrics.exposure(*metrics.group_sums(self.ds.credit, x.flatten(0, 1).cpu().numpy()))
             for x in s["played"][0].split([1, cfg.num_negatives], -1)]
        found = {"loss": loss, "judger_accuracy": right, "sampled_MGU": metrics.mgu(E[1] - E[0])}
        found = {key: float(v) for key, v in found.items()}
        self.log(event="round", round=t, **found)
        s |= {"round": t + 1, "played": None, "it": 0,
              "rounds": [*s["rounds"], found | {"log_v": s["log_v"]}]}

    def chosen(self):
        """The stage that validation chooses, of those measured so far (`report.choose`)."""
        rows = [r for r in self.state["measured"].values() if r["split"] == "val" and
                (r["stage"] == "sft" or r["stage"].startswith("ufo") and "+" not in r["stage"])]
        return report.choose(rows, self.cfg.topk)

    def take_chosen(self):
        """The player becomes the round that validation chose, the last if it chose SFT -> its name.
        """
        if self.state["best"]:
            self.policies.tuned.load_adapter("player", self.state["best"])
        return report.kept(self.chosen(), self.cfg.rounds)

    def yardsticks(self):
        """What needs no language model: the uniform distribution, and popularity in the histories
        that SFT sees (add-one).
        """
        user, history, target = self.cases["test"]
        seen_by = data.evenly(len(self.ds.users), self.cfg.train_users)
        count = self.ds.train_counts(seen_by) + 1.0
        lists = np.empty((len(user), self.cfg.topk), int)
        for n, h in enumerate(history):
            c = count.copy()
            c[h] = -1
            best = np.argsort(-c, kind="stable")[:self.cfg.topk]
            lists[n] = np.where(c[best] > 0, best, -1)
        row = metrics.report(self.ds.credit, user, self.shown(history), lists,
                             target, -np.log(count / count.sum())[target],
                             judger.TARGETS[self.cfg.target])
        unseen = len(self.ds.titles) - np.array([len(h) for h in history])
        return {"uniform": {"log_loss": math.log(len(self.ds.titles)),
                            f"HR@{self.cfg.topk}": float(np.minimum(1, self.cfg.topk
                                                                    / unseen).mean())},
                "popularity": row}


def trained(out_dir, **options):
    """The finished run in a folder, ready to be asked: a Run with data, catalog and policies.
    options: of its configuration, those to be other than they were (what is measured, say).
    """
    path = Path(out_dir) / "model.pt"
    if not path.exists():
        raise data.InputError(f"{path}: no such file; train.py writes it at the end of a run")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:              # torch's, zipfile's and pickle's, which share no parent
        raise data.InputError(f"{path}: damaged ({type(e).__name__}); train again") from None
    here = {"out_dir": str(out_dir), "device": "auto", "dtype": "auto"}
    run = Run(check(saved["config"] | here | options), begin=False)
    # its users may be others; a file that does not say what it was made of is an older one
    run.check_made_of(saved.get("made_of", ["another version of this code"])[:2], path)
    for stage in ("pretrain", "sft", "game"):
        run.enter(stage)
    run.load_weights(saved)
    return run


def set_lr(opt, peak, it, total):
    """Twenty steps of warm-up, then a cosine from peak to a fiftieth of it over `total` steps."""
    cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * it / total))
    for group in opt.param_groups:
        group["lr"] = peak * cosine * min(1.0, (it + 1) / 20)


def main(cfg):
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.resume and not any(Path(cfg.out_dir).glob("checkpoint*.pt")) \
            and (Path(cfg.out_dir) / "results.json").exists():
        return print(f"{cfg.out_dir} is finished: see its results.json")
    run = Run(cfg)
    with run.working():
        if run.state["stage"] == "pretrain":
            run.pretrain()
            run.enter("sft")
        run.measure("pretrained", "test")
        if cfg.vocab_users:     # no token is forced there, which is slow
            run.measure("pretrained", "test", over="vocab", stage="pretrained-vocab",
                        most=cfg.vocab_users)
        E_pre = np.array(run.measure("pretrained", "val")["E"])
        if run.state["stage"] == "sft":
            run.sft()
            run.enter("game")
        run.measure("sft", "test")
        run.measure("sft", "val")
        begun = run.state["round"] > 1 or run.state["played"]
        if not (run.out / "sft.pt").exists() and not cfg.sft_from and not begun:
            run.save("sft")
        while run.state["round"] <= cfg.rounds:
            run.round(run.state["round"], E_pre)
        end = run.take_chosen()
        if cfg.rerank:
            run.rerank("sft", "sft")
            if cfg.rounds:
                run.rerank("player", end)
        report.finish(run, end)


def cli(argv):
    return exit_code(lambda: main(configure(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
