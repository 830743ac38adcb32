"""nanoUFO: pretrain -> SFT -> self-play, and the table of what each did to accuracy and fairness.

    python train.py                     the toy world, CPU, under three minutes
    python train.py --dataset=ml100k    SmolLM2-135M on MovieLens-100K (ml1m: MovieLens-1M); one GPU

Options are --key=value over the Config below. Equation numbers are those of the README.
"""

import copy
import dataclasses
import difflib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corrector
import data
import judger
import machine
import metrics
import report
import selfplay
from model import Model, ModelConfig, describe, load, save_peft


@dataclass
class Config:
    # what to learn from
    dataset: str = "toy"            # toy | ml100k | ml1m | a folder with items and interactions
    header: str = ""                # the first line of every document; "": the data set's own
    data_dir: str = "data"          # downloads and prepared files are kept here
    out_dir: str = ""               # results.json, log.jsonl, model.pt; default out/<dataset>
    group_by: str = "genre"         # genre (n genres: 1/n to each) | popularity (quintiles) | yours
    target: str = "history"         # fair is: as in the histories | equal | yours (judger.TARGETS)
    holdout: int = 1                # a user's last so many items are test, as many before val
    max_users: int = 0              # keep this many users (0: all; toy: 900)
    train_users: int = 0            # SFT and the game see this many's histories (0: all)
    eval_users: int = 0             # measure on this many, evenly spaced (0: all)
    vocab_users: int = 200          # and the pretrained model over="vocab" on this many (0: none)
    history: int = 20               # titles of the history that a prompt shows
    topk: int = 10                  # length K of a recommendation list
    seed: int = 0                   # of everything drawn; the toy world itself too
    resume: bool = False            # go on with the unfinished run in out_dir, with its options
    sft_from: str = ""              # a run's out_dir: its data, model and SFT; only the game is new
    save_every: float = 60.0        # seconds between checkpoints
    # the machine
    device: str = "auto"            # auto | cuda | cpu | mps
    dtype: str = "auto"             # auto | bfloat16 | float16 | float32: base and activations
    compile: str = "auto"           # auto (on a GPU) | True | False: torch.compile training passes
    recompute: bool = False         # gradient checkpointing: less memory, a third more time
    track: str = ""                 # wandb | tensorboard: log there too, if it is installed
    eval_batch: int = 64            # users at a time in search and play
    search: str = "auto"            # exact top K: best-first | catalog (all of it in one pass)
    # the model
    init_from: str = "HuggingFaceTB/SmolLM2-135M"   # hub id | folder | file.gguf | scratch
    tokens: str = "text"            # scratch: text | items (one token a title, a yardstick)
    dim: int = 96                   # scratch: width
    n_layers: int = 3               # scratch: blocks
    n_heads: int = 4                # scratch: query heads; half as many keys/values if even
    dropout: float = 0.0            # scratch: of the residual branches
    pretrain_iters: int = 600       # scratch: steps on the web corpus or the catalog's cards
    pretrain_lr: float = 2e-3       # scratch: peak
    # SFT
    batch_size: int = 16            # windows a step, SFT and self-play
    lora_rank: int = 16             # rank of both adapters; their product is scaled by 2
    sft_full: bool = False          # scratch: SFT trains all weights, not an adapter
    sft_window: int = 21            # titles a training window holds: a history and its next item
    sft_iters: int = 3000           # steps at most, over which the rate falls to a fiftieth
    sft_lr: float = 1e-3            # peak
    weight_decay: float = 0.01      # AdamW's, SFT and self-play
    eval_every: int = 250           # steps between looks at validation NDCG
    patience: int = 4               # looks without a better one before SFT stops (0: never)
    # self-play
    method: str = "ufo"             # or a baseline or an ablation: a name in METHODS
    loss: str = "logistic"          # the corrector's, (9) | yours (corrector.LOSSES)
    rounds: int = 4                 # T
    round_iters: int = 150          # corrector steps a round, on as many fresh batches
    lr: float = 2e-4                # of the corrector
    branches: int = 8               # places in each window at which the game is played
    num_negatives: int = 16         # S, items the opponent makes up at each place
    temperature: float = 1.0        # tau of the opponent's sampling
    lam: float = 1.0                # lambda of (6), (9): the strength of the anchor
    alpha: float = 1.0              # share of the opponent, not SFT, in the anchor; 1 is SPIN's
    gamma: float = 0.4              # gain of the controller (7); 0 turns the reweighting off
    accumulate: bool = True         # log v is the sum of all rounds' verdicts, not the last alone
    negatives: str = "sampled"      # from the opponent | its top S | uniform over the catalog
    rerank: bool = False            # also add a group bias to SFT's and the last round's lists


# what a data set changes; then what a model from scratch changes on MovieLens
PRESETS = {
    "toy": dict(init_from="scratch", history=15, batch_size=32, eval_batch=200, pretrain_iters=700,
                sft_window=16, sft_iters=180, sft_lr=3e-3, eval_every=180,
                rounds=3, round_iters=30, lr=3e-4, num_negatives=8, gamma=0.5),
    "ml100k": dict(),
    "ml1m": dict(sft_iters=8000, eval_every=500, batch_size=32),
    "scratch": dict(dim=160, n_layers=3, n_heads=5, dropout=0.2, sft_full=True, history=30,
                    sft_window=31, sft_iters=2700, sft_lr=2e-3, eval_every=300, weight_decay=0.1,
                    lr=1.5e-3, round_iters=80, gamma=0.8),
}
# what a baseline or an ablation changes, over the same loop
METHODS = {
    "ufo": {},
    "sft-more": dict(loss="sft", gamma=0.0, num_negatives=1),       # as many steps more of SFT
    "spin": dict(num_negatives=1, gamma=0.0, temperature=1.0, alpha=1.0),
    "ufo-mix": dict(alpha=0.5),                             # the geometric mixture as the anchor
    "no-reweight": dict(gamma=0.0),
    "one-shot": dict(gamma=1.0, accumulate=False),          # the verdict at once, not by degrees
    "sprec": dict(negatives="top", num_negatives=1, loss="both", gamma=0.0),
    "dpo": dict(negatives="uniform", alpha=0.0, gamma=0.0),         # anchored to the SFT model
    "ifairlrs": dict(loss="sft", num_negatives=1),          # SFT with the weights (8)
    "rerank": dict(rounds=0, rerank=True),                  # no training, a bias a group
}
CHOICES = {
    "group_by": data.GROUPINGS, "target": judger.TARGETS, "loss": corrector.LOSSES,
    "method": METHODS, "negatives": ("sampled", "top", "uniform"),
    "track": ("", "wandb", "tensorboard"),
    "tokens": ("text", "items"),
    "device": ("auto", "cuda", "cpu", "mps"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "compile": ("auto", "True", "False"),
    "search": ("auto", "best-first", "catalog"),
}
AT_LEAST = dict(
    holdout=1, max_users=0, train_users=0, eval_users=0,
    vocab_users=0, history=1, topk=1, batch_size=1, eval_batch=1, dropout=0,
    lora_rank=1, sft_window=2, seed=0, save_every=0, weight_decay=0, sft_iters=0, eval_every=1,
    patience=0, pretrain_iters=0, rounds=0, round_iters=1, branches=1, num_negatives=1, gamma=0,
    lam=0, alpha=0)


# options that do not change a result: where it is kept, and how safely
PLACES = ("out_dir", "data_dir", "resume", "sft_from", "save_every")
# those that --sft_from leaves free: what is measured, and the game
MEASURED = ("group_by", "target", "eval_users")
GAME = tuple(itertools.dropwhile(lambda k: k != "method", Config.__dataclass_fields__))


def nearest(word, options):
    close = difflib.get_close_matches(word, options, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(options)}"


def parse(argv, options):
    """['--key=value', ...] -> {key: value} with the types of the fields of the dataclass `options`;
    --key alone is --key=True. InputError in a line.
    """
    fields = {f.name: f for f in dataclasses.fields(options)}
    typed = {}
    for arg in argv:
        key, eq, value = arg.partition("=")
        if not key.startswith("--"):
            raise data.InputError(f"{arg!r}: options are written --key=value")
        key = key[2:]
        if key not in fields:
            raise data.InputError(f"unknown option --{key}{nearest(key, fields)}")
        kind = fields[key].type
        value = value if eq else "True" if kind is bool else ""
        try:
            typed[key] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise data.InputError(f"--{key}={value}: expected "
                                  f"{'True or False' if kind is bool else kind.__name__}") from None
    return typed


def check(cfg):
    """InputError where a field is not among its CHOICES or under its AT_LEAST. -> cfg"""
    for key, value in dataclasses.asdict(cfg).items():
        if isinstance(value, str) and value not in CHOICES.get(key, [value]):
            raise data.InputError(f"--{key}={value}: not known{nearest(value, CHOICES[key])}")
        if key in AT_LEAST and not value >= AT_LEAST[key]:
            raise data.InputError(f"--{key}={value}: must be at least {AT_LEAST[key]}")
        if isinstance(value, int | float) and abs(value) >= 2 ** 31:
            raise data.InputError(f"--{key}={value}: too large")
    return cfg


def inherit(typed, saved, free, whose):
    """What was typed, with the options of the run `saved` that are not `free` as if typed too."""
    saved = {k: v for k, v in saved["config"].items() if k not in free}
    if other := [f"{k} was {saved[k]}" for k in typed if typed[k] != saved.get(k, typed[k])]:
        raise data.InputError(f"{whose} was begun with other options: {', '.join(other)}; leave "
                              f"them out, or use another --out_dir")
    return saved | typed


def configure(argv):
    """Options -> Config: the class's defaults, the data set's preset, the method's, then what was
    typed. With --resume or --sft_from: the options of that run, which what was typed must not
    contradict. InputError in a line.
    """
    typed = parse(argv, Config)
    name, known = typed.get("dataset", Config.dataset), ("toy", "ml100k", "ml1m")
    if name not in known and not Path(name).is_dir():
        raise data.InputError(f"--dataset={name}: no such data set, and no such "
                              f"folder{nearest(name, known)}")
    out = Path(typed.get("out_dir") or f"out/{Path(name).resolve().name}")
    if typed.get("resume") and (begun := machine.read_checkpoint(out)):
        typed = ({k: begun["config"][k] for k in PLACES}
                 | inherit(typed, begun, PLACES, f"--resume: {out}"))
    elif typed.get("resume") and not {"dataset", "sft_from"} & set(typed) \
            and not (out / "results.json").exists():
        raise data.InputError(f"--resume: no whole checkpoint in {out}; begin there without "
                              f"--resume, or name another --out_dir")
    elif source := typed.get("sft_from"):
        if out.resolve() == Path(source).resolve() or "out_dir" not in typed:
            raise data.InputError(f"--sft_from={source}: give this run an --out_dir of its own")
        if not (begun := machine.read_checkpoint(Path(source), "sft")):
            raise data.InputError(f"--sft_from={source}: no whole sft.pt there; train.py writes it "
                                  f"when its SFT is done")
        typed = inherit(typed, begun, PLACES + MEASURED + GAME, f"--sft_from: {source}")
    name = typed.get("dataset", name)
    preset = dict(PRESETS[name]) if name in known else {}
    if name != "toy" and typed.get("init_from") == "scratch":
        preset |= PRESETS["scratch"]
    preset |= METHODS.get(typed.get("method"), {})
    cfg = Config(**(preset | typed | {"out_dir": str(out)}))
    check(cfg)
    for key in ("temperature", "sft_lr", "lr", "pretrain_lr"):
        if not getattr(cfg, key) > 0:
            raise data.InputError(f"--{key}={getattr(cfg, key)}: must be above 0")
    if cfg.alpha > 1 or cfg.dropout >= 1:
        raise data.InputError("--alpha must be at most 1 and --dropout under 1")
    if cfg.dim % (2 * cfg.n_heads):
        raise data.InputError(f"--dim={cfg.dim}: must be a multiple of twice "
                              f"--n_heads={cfg.n_heads}")
    if cfg.init_from != "scratch" and (cfg.sft_full or cfg.tokens != "text"):
        raise data.InputError("--sft_full and --tokens=items are for --init_from=scratch")
    return cfg


class Stopped(Exception):
    """Ctrl-C: the run has saved itself."""


# ---------------------------------------------------------------------- the run

COLLAPSE = 0.5      # under this share of SFT's coverage a policy is called collapsed


class Policies:
    """The three policies by name, over one frozen base: policies("pretrained" | "sft" | "player")
    -> the model, switched.

    `tuned` is the base itself, carrying the adapters "sft" and "player". Only with sft_full is it a
    second model (a copy that SFT trains whole, then frozen in its turn; its "player" adapter starts
    at zero, which is the SFT model).
    """

    def __init__(self, base, full):
        self.base, self.full = base, full
        self.tuned = copy.deepcopy(base) if full else base

    def __call__(self, name):
        model = self.base if name == "pretrained" else self.tuned
        return model.use(None if name == "pretrained" or (self.full and name == "sft") else name)


class Run:
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
        self.compile = cfg.compile == "True" or (cfg.compile == "auto" and on_gpu)
        self.multiple = 8 if on_gpu else 1                 # rows are padded to a multiple of it
        self.peak = machine.matmul_peak(self.device, self.dtype)
        torch.manual_seed(cfg.seed)
        self.ds = ds = data.load_dataset(cfg.dataset, cfg.data_dir, cfg.group_by, cfg.holdout,
                                         cfg.max_users, cfg.seed, cfg.header)
        if cfg.topk >= len(ds.titles):
            raise data.InputError(f"--topk={cfg.topk}: the catalog has {len(ds.titles)} titles")
        self.base, self.tokenizer, self.source = self.build()
        self.catalog = data.Catalog(ds.titles, ds.header, self.tokenizer, cfg.history)
        self.catalog.trie.to(self.device)
        self.base.to(self.device)
        self.base.compute_dtype = self.dtype
        self.cases = {split: spaced(ds.cases(split), cfg.eval_users)
                      for split in ("val", "test")}
        n = sum(map(len, ds.histories))
        print(f"{cfg.dataset}: {len(ds.users)} users, {len(ds.titles)} titles, {n} ratings, "
              f"{len(ds.groups)} groups by {cfg.group_by}; "
              f"{self.catalog.lengths.mean():.1f} tokens a title, "
              f"{(self.catalog.trie.modes['trie'].step_node >= 0).sum(1).float().mean():.1f} of "
              f"them choices")
        print(f"model: {describe(self.base)}, from {self.source}; tokens: {self.tokenizer.name}")
        self.state = {"stage": "", "it": 0, "measured": {}, "looks": [], "best": None, "round": 1,
                      "log_v": [0.0] * len(ds.groups), "played": None, "losses": [], "right": [],
                      "rounds": [], "skipped": 0, "minutes": 0.0}
        if begin:
            self.open(Path(cfg.out_dir))

    # ------------------------------------------------------------------ where it is, and going on

    def open(self, out):
        """Begin in the folder `out`, go on from its checkpoint, or after the SFT of --sft_from."""
        try:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint = machine.read_checkpoint(out)
            if checkpoint and not self.cfg.resume:
                raise data.InputError(f"{out} holds an unfinished run: --resume goes on with it; "
                                      f"or delete its checkpoint*.pt, or use another --out_dir")
            own = checkpoint is not None
            self.log_file = open(out / "log.jsonl", "r+" if own else "w")
            if not own:
                (out / "sft.pt").unlink(missing_ok=True)    # another run's
        except OSError as e:
            raise data.InputError(f"--out_dir={out}: {e.strerror}; choose another") from None
        self.out, self.saved, self.stop = out, time.time(), False
        self.track = machine.tracker(self.cfg)
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
        if checkpoint["made_of"] != self.made_of():
            raise data.InputError(f"{self.cfg.sft_from or out} was begun on "
                                  f"{checkpoint['made_of']}, here is {self.made_of()}: give it the "
                                  f"same --data_dir and model")
        fresh, self.state = self.state, self.state | checkpoint["state"]
        self.load_weights(checkpoint)
        if own:
            self.opt.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
        elif any(checkpoint["config"][k] != getattr(self.cfg, k) for k in MEASURED):
            self.state |= {"measured": {}, "log_v": fresh["log_v"]}
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        self.log_file.truncate(min(checkpoint["log_size"], self.log_file.seek(0, os.SEEK_END)))
        self.log_file.seek(0, os.SEEK_END)
        self.start = time.time() - 60 * self.state["minutes"]
        s = self.state
        where = f"round {s['round']}, " if s["stage"] == "game" else ""
        print(f"going on from {s['stage']}, {where}step {s['it']}, minute {s['minutes']:.1f}")

    def made_of(self):
        """[base model, titles, interactions]: a run must not go on with others."""
        return [self.source, len(self.ds.titles), sum(map(len, self.ds.histories))]

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

    def save(self, stem="checkpoint"):
        self.state["minutes"] = self.minutes()
        cuda = {"cuda_rng": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {}
        done = machine.write_checkpoint(self.out, self.weights() | cuda | {
            "config": dataclasses.asdict(self.cfg), "state": self.state, "made_of": self.made_of(),
            "optimizer": self.opt.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(), "log_size": self.log_file.tell()},
            stem)
        self.saved = time.time()
        return done

    def breathe(self):
        """Called wherever the state is whole: saves now and then, and stops if Ctrl-C was hit."""
        done = self.stop or time.time() - self.saved >= self.cfg.save_every
        done = self.save() if done else False
        if self.stop:
            raise Stopped(f"stopped {'and saved' if done else 'but NOT saved'}; to go on: python "
                          f"train.py --resume --out_dir={self.cfg.out_dir}")

    def steps(self, name, total):
        """The steps of a stage that are still to be made, with a bar."""
        self.bar = tqdm(range(self.state["it"], total), name, total=total, leave=False,
                        initial=self.state["it"], disable=None)
        for it in self.bar:
            self.breathe()
            yield it
            self.state["it"] = it + 1

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
                tok = data.item_tokenizer(ds)
            else:
                texts = lines + [ds.header] + ds.corpus
                if cfg.dataset == "toy":
                    raw = data.word_tokenizer(texts)
                else:               # the tokens of the pretrained model it stands beside
                    folder, gguf, _ = data.fetch_model(Config.init_from, cfg.data_dir)
                    raw = data.model_tokenizer(folder, gguf, texts)
                tok = raw.compact(texts)
            c = ModelConfig(tok.vocab_size, dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads,
                            n_kv_heads=cfg.n_heads // 2 if cfg.n_heads % 2 == 0 else cfg.n_heads,
                            head_dim=cfg.dim // cfg.n_heads, ffn_dim=8 * cfg.dim // 3,
                            dropout=cfg.dropout)
            return Model(c), tok, "scratch"
        folder, gguf, source = data.fetch_model(cfg.init_from, cfg.data_dir)
        try:
            tok = data.model_tokenizer(folder, gguf, lines + [ds.header])
            return load(folder, gguf), tok, source
        except data.InputError:
            raise
        except Exception as e:      # transformers' and gguf's own errors, which share no parent
            why = (str(e).splitlines() or [""])[0]
            raise data.InputError(f"init_from={cfg.init_from}: cannot be read "
                                  f"({type(e).__name__}: {why})") from None

    def batches(self, what, start):
        """Endless batches of training windows, in the order of the number `what`, from the batch
        `start` on.
        """
        cfg, users = self.cfg, evenly(len(self.ds.users), self.cfg.train_users)
        return itertools.islice(data.training_batches(
            [self.ds.train(u) for u in users], cfg.sft_window, cfg.batch_size, self.catalog.lengths,
            np.random.default_rng([cfg.seed, what])), start, None)

    def width(self, rows):
        """How many prefixes `Search.top_k` runs at a time; 0: the whole catalog in one pass, which
        a GPU does sooner than it waits for several, as long as the pass is small.
        """
        nodes = int(self.catalog.trie.modes["trie"].decision.sum())
        one_pass = self.device.type == "cuda" and rows * nodes <= 2 ** 16
        return 0 if self.cfg.search == "catalog" or (self.cfg.search == "auto" and one_pass) else 8

    def minutes(self):
        return (time.time() - self.start) / 60

    def log(self, **line):
        """A line of log.jsonl. A full disk costs the line, not the run."""
        self.track(line)
        try:
            self.log_file.write(json.dumps(line | {"minutes": round(self.minutes(), 3)}) + "\n")
            self.log_file.flush()
        except OSError as e:
            print(f"!! {self.out}/log.jsonl: {e.strerror}; a line was lost", flush=True)

    # ----------------------------------------------------------- one optimizer step, one evaluation

    def step(self, loss):
        """Backward, clip to norm 1, update -> the loss, a number. With float16 the scaler leaves a
        step out when a gradient overflows; those are counted.
        """
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.opt)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        self.state["skipped"] += scale > 0 and self.scaler.get_scale() < scale
        value = loss.item()                # the one wait for the GPU in a step
        if not math.isfinite(value):
            s = self.state
            where = f"round {s['round']}, " if s["stage"] == "game" else ""
            raise SystemExit(f"stopped: the loss is {value} in {s['stage']}, {where}step and batch "
                             f"{s['it']}; the last checkpoint in {self.out} is from before it: "
                             f"lower the learning rate and start anew")
        return value

    @torch.no_grad()
    def measure(self, policy, split, over="trie", stage=None, most=0):
        """Top-K lists and log-loss of a policy on the cases of a split -> metrics.report's dict,
        with the lists. Logs a line. most: of so many users only, evenly spaced. What a stage has
        been measured at is kept: a second call returns it.
        """
        cfg, t0, stage = self.cfg, time.time(), stage or policy
        if (key := f"{stage} {split} {over}") in self.state["measured"]:
            return self.state["measured"][key]
        user, history, target = spaced(self.cases[split], most)
        model = self.policies(policy).eval()
        # like lengths together, the longest first
        size = [self.catalog.lengths[h[-cfg.history:]].sum() for h in history]
        order = np.argsort(size, kind="stable")[::-1]
        lists, log_loss, run = np.empty((len(user), cfg.topk), int), np.empty(len(user)), 0
        for i in tqdm(range(0, len(order), cfg.eval_batch), f"{stage} {split}", leave=False,
                      disable=None):
            self.breathe()
            b = order[i:i + cfg.eval_batch]
            search = selfplay.Search(model, self.catalog.trie,
                                     self.catalog.prompts([history[n] for n in b], self.device),
                                     over)
            items = torch.as_tensor(target[b], device=self.device)[:, None]
            log_loss[b] = -search.score(items)[:, 0].cpu().double().numpy()
            seen = torch.zeros(len(b), len(self.ds.titles), dtype=torch.bool, device=self.device)
            for row, n in enumerate(b):
                seen[row, history[n]] = True
            items, _, n_run = search.top_k(cfg.topk, seen, self.width(len(b)))
            lists[b], run = items.cpu().numpy(), run + int(n_run.sum())
        return self.record(stage, split, over, (user, history, target), lists, log_loss,
                           run / len(user), time.time() - t0)

    def record(self, stage, split, over, cases, lists, log_loss, prefixes=0.0, seconds=0.0):
        """Report on lists (N, K) and log_loss (N,) of a stage, log and print it, keep it."""
        (user, history, target), cfg = cases, self.cfg
        row = metrics.report(self.ds.credit, user, [h[-cfg.history:] for h in history], lists,
                             target, log_loss, judger.TARGETS[cfg.target])
        k = cfg.topk
        self.log(event="eval", stage=stage, split=split, over=over, prefixes=prefixes,
                 seconds=seconds, **{m: row[m] for m in row if m not in ("ci", "E", "E_star")})
        print(f"[{self.minutes():5.1f} min] {stage:>14} {split:4} {over:5} HR@{k} "
              f"{row[f'HR@{k}']:.4f}  NDCG@{k} {row[f'NDCG@{k}']:.4f}  "
              f"MGU@{k} {row[f'MGU@{k}']:.4f}  DGU@{k} {row[f'DGU@{k}']:.4f}  log-loss "
              f"{row['log_loss']:.3f}  coverage {row['coverage']:.3f}  "
              f"({prefixes:.0f} prefixes a user, {seconds:.0f} s)", flush=True)
        row |= {"stage": stage, "split": split, "over": over, "lists": lists.tolist(),
                "minutes": round(self.minutes(), 2), "collapsed": False}
        sft = row if stage == "sft" else self.state["measured"].get(f"sft {split} {over}")
        if sft:
            row["less_sft"] = self.difference(row, sft)
        if sft and row["coverage"] < COLLAPSE * sft["coverage"]:
            row["collapsed"] = True
            self.log(event="collapsed", stage=stage, coverage=row["coverage"])
            print(f"!! COLLAPSED: the lists of {stage} cover {row['coverage']:.3f} of the catalog, "
                  f"under {COLLAPSE:.0%} of SFT's {sft['coverage']:.3f}", flush=True)
        # plain numbers and lists, as NumPy's own would have to be unpickled
        key = f"{stage} {split} {over}"
        self.state["measured"][key] = json.loads(json.dumps(row))
        return self.state["measured"][key]

    def difference(self, row, other):
        """One measured row less another of the same split, paired by user (metrics.difference)."""
        user, history, target = self.cases[row["split"]]
        return metrics.difference(self.ds.credit, user, [h[-self.cfg.history:] for h in history],
                                  row["lists"], other["lists"], target,
                                  judger.TARGETS[self.cfg.target])

    @torch.no_grad()
    def rerank(self, policy, stage):
        """The baseline without training: a bias for every group, fitted on the validation lists of
        a policy (`judger.fit_bias`) and added to its log q on both splits.
        """
        cfg, A, beta = self.cfg, self.ds.credit, None
        if f"{stage}+rerank test trie" in self.state["measured"]:
            return
        model = self.policies(policy).eval()
        everything = torch.arange(len(self.ds.titles), device=self.device)
        for split in ("val", "test"):
            user, history, target = self.cases[split]
            scores = np.empty((len(user), len(everything)))
            for i in tqdm(range(0, len(user), cfg.eval_batch), f"{stage}+rerank {split}",
                          leave=False, disable=None):
                self.breathe()
                prompt = self.catalog.prompts(history[i:i + cfg.eval_batch], self.device)
                search = selfplay.Search(model, self.catalog.trie, prompt)
                scores[i:i + cfg.eval_batch] = search.score(everything.expand(
                    len(prompt[0]), -1)).cpu().double().numpy()
            biased = scores.copy()
            for n, h in enumerate(history):
                biased[n, h] = -np.inf
            if beta is None:
                row = self.state["measured"][f"{stage} val trie"]
                beta = judger.fit_bias(biased, A, np.array(row["E_star"]), cfg.topk)
            scores += A @ beta
            norm = np.logaddexp.reduce(scores, axis=1)
            biased += A @ beta
            lists = np.argsort(-biased, axis=1, kind="stable")[:, :cfg.topk]
            lists[~np.isfinite(np.take_along_axis(biased, lists, 1))] = -1    # seen, all of them
            self.record(f"{stage}+rerank", split, "trie", (user, history, target), lists,
                        norm - scores[np.arange(len(user)), target])

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
            rng = np.random.default_rng([cfg.seed, 0, it])
            batch = [docs[k] for k in rng.integers(len(docs), size=2 * cfg.batch_size)]
            length = torch.tensor([len(d) for d in batch], device=self.device)
            tokens = data.pad(batch, self.multiple).to(self.device)
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
        s, tuned = self.state, self.policies.tuned
        if all(at != it for at, _ in s["looks"]):
            row = self.measure("sft", "val", stage=f"sft {it}")
            score = row[f"NDCG@{self.cfg.topk}"]
            if score > max([x for _, x in s["looks"]], default=-1):
                s["best"] = (copy.deepcopy(tuned.state_dict()) if self.cfg.sft_full
                             else tuned.adapter_state("sft"))
            s["looks"].append([it, score])
        scores = [x for _, x in s["looks"]]
        since = len(scores) - 1 - int(np.argmax(scores))
        return 0 < self.cfg.patience <= since

    def sft(self):
        """Maximise (1) on windows of the histories, every title but a window's first; keep the
        weights of the best validation NDCG.
        """
        cfg, policies, speed = self.cfg, self.policies, machine.Speed(self)
        batches = self.batches(1, self.state["it"])
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
            # nats a title
            loss = -selfplay.step_log_prob(model, self.catalog.trie, hidden, node, child).sum() / n
            loss = self.step(loss)
            speed.end(policies.tuned, windows, len(at))
            if it % 10 == 0:
                self.bar.set_postfix(log_loss=f"{loss:.3f}")
                self.log(event="sft", it=it, loss=loss)
        else:
            self.look(cfg.sft_iters)
        if cfg.sft_full:
            policies.tuned.load_state_dict(self.state["best"])
        else:
            policies.tuned.load_adapter("sft", self.state["best"])
        self.state["best"] = None
        print(f"[{self.minutes():5.1f} min] SFT: {speed.report()}")

    def judge(self, t, E_pre):
        """Round t's verdict on the groups: the controller (7) on the validation lists of the player
        as it stands -> what is to be logged of it, log v (G,) among it.
        """
        val = self.state["measured"][f"{f'ufo-{t - 1}' if t > 1 else 'sft'} val trie"]
        E_star, E_t = np.array(val["E_star"]), np.array(val["E"])
        log_v = np.array(self.state["log_v"]) * self.cfg.accumulate
        log_v = judger.control(log_v, E_star, E_t, self.cfg.gamma)
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

        def bar(loop):
            for x in tqdm(loop, "play", disable=None, leave=False):
                self.breathe()
                yield x
        generator = torch.Generator(self.device).manual_seed(1000 * cfg.seed + t)
        return selfplay.play(self.policies, self.catalog, windows, places, cfg.num_negatives,
                             cfg.temperature, max(1, cfg.eval_batch // cfg.branches), cfg.alpha,
                             bar, generator, cfg.negatives)

    def correct(self, windows, places, weights):
        """A round's corrector steps: minimise (9) on what was played."""
        cfg, s = self.cfg, self.state
        items, logq_t, logq_sft = s["played"]
        for it in self.steps("correct", cfg.round_iters):
            b = slice(it * cfg.batch_size, (it + 1) * cfg.batch_size)
            model = self.policies("player").eval()          # no dropout: f = 0 at the start
            prompt = self.catalog.branches(windows[b], places[b], self.device, self.multiple)
            logq = selfplay.log_q(model, self.catalog.trie, prompt, items[b])      # (B, A, 1 + S)
            f = judger.score(logq, logq_t[b], logq_sft[b], cfg.lam, cfg.alpha).flatten(0, 1)
            loss = self.step(corrector.LOSSES[cfg.loss](f, weights[items[b, :, 0]].flatten()))
            right = judger.accuracy(f.detach())
            s["losses"].append(loss), s["right"].append(right)
            if it % 10 == 0:
                self.bar.set_postfix(loss=f"{loss:.3f}", judger=f"{np.mean(s['right']):.3f}")
                self.log(event="correct", it=it, loss=loss, judger_accuracy=right)

    def round(self, t, E_pre):
        """Round t of the game: judge the groups (7) -> play -> correct (9) -> measure."""
        cfg, s, n = self.cfg, self.state, self.cfg.round_iters
        windows = [w for b in itertools.islice(self.batches(2, n * (t - 1)), n) for w in b]
        places = data.draw_places(windows, cfg.branches, np.random.default_rng([cfg.seed, 3, t]))
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
        print(f"round {t}: play and correct: loss {loss:.3f} (log(1 + S) = "
              f"{math.log(1 + cfg.num_negatives):.3f}), judger right on {right:.3f} of pairs")
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
            return self.chosen()
        return f"ufo-{self.cfg.rounds}" if self.cfg.rounds else "sft"

    def yardsticks(self):
        """What needs no language model: the uniform distribution, and popularity in the training
        histories (add-one).
        """
        user, history, target = self.cases["test"]
        count = self.ds.train_counts() + 1.0
        lists = np.empty((len(user), self.cfg.topk), int)
        for n, h in enumerate(history):
            c = count.copy()
            c[h] = -1
            lists[n] = np.argsort(-c, kind="stable")[:self.cfg.topk]
        row = metrics.report(self.ds.credit, user, [h[-self.cfg.history:] for h in history], lists,
                             target, -np.log(count / count.sum())[target],
                             judger.TARGETS[self.cfg.target])
        unseen = len(self.ds.titles) - np.array([len(h) for h in history])
        return {"uniform": {"log_loss": math.log(len(self.ds.titles)),
                            f"HR@{self.cfg.topk}": float((self.cfg.topk / unseen).mean())},
                "popularity": row}


def trained(out_dir):
    """The finished run in a folder, ready to be asked: a Run with data, catalog and policies."""
    path = Path(out_dir) / "model.pt"
    if not path.exists():
        raise data.InputError(f"{path}: no such file; train.py writes it at the end of a run")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:              # torch's, zipfile's and pickle's, which share no parent
        raise data.InputError(f"{path}: damaged ({type(e).__name__}); train again") from None
    here = {"out_dir": str(out_dir), "device": "auto", "dtype": "auto"}
    run = Run(Config(**saved["config"] | here), begin=False)
    for stage in ("pretrain", "sft", "game"):
        run.enter(stage)
    run.load_weights(saved)
    return run


def spaced(cases, n):
    """The cases (user, history, target) of n users, evenly spaced; of all if n is 0 or too many."""
    user, history, target = cases
    ids = np.unique(user)
    kept = np.flatnonzero(np.isin(user, ids[evenly(len(ids), n)]))
    return user[kept], [history[k] for k in kept], target[kept]


def evenly(total, n):
    """n of the numbers 0 .. total - 1, evenly spaced; all of them if n is 0 or too many."""
    return np.arange(n) * total // n if 0 < n < total else np.arange(total)


def set_lr(opt, peak, it, total):
    """Twenty steps of warm-up, then a cosine from peak to a fiftieth of it over `total` steps;
    total = 0: constant at the peak.
    """
    cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * it / total)) if total else 1.0
    for group in opt.param_groups:
        group["lr"] = peak * cosine * (min(1.0, (it + 1) / 20) if total else 1.0)


# ---------------------------------------------------------------------- the end of a run

def finish(run, end):
    """The reports, results.json, model.pt and, with matplotlib, exposure.png; the checkpoints go.
    end: the stage that is kept.
    """
    cfg, k = run.cfg, f"MGU@{run.cfg.topk}"
    rows = [row for row in run.state["measured"].values() if row["split"] == "test"]
    stages = {row["stage"]: row for row in rows}
    yardsticks, chosen = run.yardsticks(), run.chosen()
    origins = report.origin_report(run, stages["pretrained"], stages["sft"], stages[end])
    report.example_lists(run, stages["sft"], stages[end])
    report.results_table(rows, yardsticks, cfg.topk)
    strip = lambda row: {key: v for key, v in row.items() if key not in ("lists", "minutes")}
    plain = [strip(row) for row in rows]
    for row, full in zip(plain, rows):
        if "less_sft" in row and "sft+rerank" in stages:
            row["less_rerank"] = run.difference(full, stages["sft+rerank"])
    results = {
        "config": {key: v for key, v in dataclasses.asdict(cfg).items() if key not in PLACES},
        "versions": machine.versions(run), "origins": origins, "yardsticks": yardsticks,
        "rows": plain, "chosen": chosen, "rounds": run.state["rounds"], "skipped_steps": run.state["skipped"],
        "validation": [strip(r) for r in run.state["measured"].values() if r["split"] == "val"]}
    model = io.BytesIO()                # torch's own writing to a full disk is no OSError
    torch.save({"config": dataclasses.asdict(cfg)} | run.weights(), model)
    try:
        if cfg.init_from != "scratch":
            stand_in = "==" in run.source       # not the weights that init_from names: say which
            save_peft(run.policies.tuned, "player", run.out / "adapter", run.source if stand_in
                      else cfg.init_from, run.source.partition("@")[2] or None)
        for name, raw in (("model.pt", model.getbuffer()),
                          ("results.json", json.dumps(results, indent=1).encode())):
            (run.out / f"{name}.new").write_bytes(raw)
            os.replace(run.out / f"{name}.new", run.out / name)
    except OSError as e:
        for path in run.out.glob("*.new"):
            path.unlink()
        run.save()
        raise data.InputError(f"{run.out}: {e.strerror}; make room there and --resume") from None
    if importlib.util.find_spec("matplotlib"):
        report.draw_exposure(results, run.out / "exposure.png")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if run.compile else 0
    memory = machine.peak_memory(run.device)
    run.log(event="done", compiled_graphs=graphs, peak_memory_gib=memory)
    for path in run.out.glob("checkpoint*.pt"):
        path.unlink()
    print(f"by validation, {chosen} is the one to choose; model.pt holds SFT and {end}")
    print(f"{k}: {stages[end][k] / stages['sft'][k] - 1:+.0%} against SFT; {run.minutes():.1f} "
          f"minutes in all, at most {memory:.1f} GiB, {graphs} compiled graphs, "
          f"{run.state['skipped']} steps left out for overflow; results in {run.out}/results.json")


def main(cfg):
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.resume and not any(Path(cfg.out_dir).glob("checkpoint*.pt")) \
            and (Path(cfg.out_dir) / "results.json").exists():
        return print(f"{cfg.out_dir} is finished: see its results.json")
    run = Run(cfg)

    def ask_to_stop(*_):
        run.stop = True
        signal.signal(signal.SIGINT, before)                # a second Ctrl-C stops at once
    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
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
        if not (run.out / "sft.pt").exists() and not cfg.sft_from:
            run.save("sft")
        while run.state["round"] <= cfg.rounds:
            run.round(run.state["round"], E_pre)
        end = run.take_chosen()
        if cfg.rerank:
            run.rerank("sft", "sft")
            if cfg.rounds:
                run.rerank("player", end)
        finish(run, end)
    finally:
        signal.signal(signal.SIGINT, before)


def exit_code(work):
    """Do the work, and turn what the user can mend into one line on stderr. -> the exit code."""
    try:
        work()
        return 0
    except (data.InputError, torch.OutOfMemoryError, OSError) as e:
        why = str(e).splitlines()[0]
        if isinstance(e, torch.OutOfMemoryError):
            why += " Lower --batch_size (training) or --eval_batch (search and play)"
        elif isinstance(e, OSError):
            why = f"{e.filename}: {e.strerror}"
        print(f"error: {why}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as e:
        print(f"\n{str(e) or 'stopped before there was anything new to save'}")
        return 130


def cli(argv):
    return exit_code(lambda: main(configure(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
