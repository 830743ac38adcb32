"""Options: one dataclass with a line on every field, what a data set or a method changes of it, and
how a command line becomes one.

The class's defaults, then the data set's preset, then the method's, then what was typed as
--key=value. What cannot be used is one line on stderr, with exit code 2 (`exit_code`).
"""

import dataclasses
import difflib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import corrector
import data
import judger
import machine


@dataclass
class Config:
    # what to learn from
    dataset: str = "toy"            # toy | ml100k | ml1m | a folder with items and interactions
    header: str = ""                # the first line of every document; "": the data set's own
    data_dir: str = "data"          # downloads and prepared files are kept here
    out_dir: str = ""               # results.json, log.jsonl, model.pt; default out/<dataset>
    group_by: str = "genre"         # genre (n genres: 1/n to each) | popularity (quintiles) | yours
    target: str = "history"         # fair is: as in the histories | equal | yours (judger.TARGETS)
    holdout: int = 1                # a user's last n items are test, the n before them val
    max_users: int = 0              # keep this many users (0: all; toy: 900)
    train_users: int = 0            # SFT and the game train on so many users (0: all)
    eval_users: int = 0             # measure on this many, evenly spaced (0: all)
    vocab_users: int = 200          # and the pretrained model over="vocab" on these (0: none)
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
    dropout: float = 0.0            # scratch: of embeddings and residual branches
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
    method: str = "ufo"             # or a baseline or an ablation: a name in METHODS. It and all
    #                                 that follows is the game's (GAME), free under --sft_from
    loss: str = "logistic"          # the corrector's, (9) | yours (corrector.LOSSES)
    rounds: int = 4                 # T
    round_iters: int = 150          # corrector steps a round, on as many fresh batches
    lr: float = 5e-5                # of the corrector
    branches: int = 8               # places in each window at which the game is played
    num_negatives: int = 4          # S, items the opponent makes up at each place
    temperature: float = 1.0        # tau of the opponent's sampling
    lam: float = 3.0                # lambda of (6), (9): the strength of the anchor
    alpha: float = 1.0              # share of the opponent, not SFT, in the anchor; 1 is SPIN's
    gamma: float = 0.4              # gain of the controller (7); 0 turns the reweighting off
    accumulate: bool = True         # log v is the sum of all rounds' verdicts, not the last alone
    negatives: str = "sampled"      # from the opponent | its top S | uniform over the catalog
    game_dropout: bool = False      # the corrector's steps have dropout too; f = 0 only without
    rerank: bool = False            # also add a group bias to SFT's and the kept round's lists


# what a data set changes; then what a model from scratch changes, but on the toy
PRESETS = {
    "toy": dict(init_from="scratch", history=15, batch_size=32, eval_batch=200, pretrain_iters=700,
                sft_window=16, sft_iters=180, sft_lr=3e-3, eval_every=180,
                rounds=3, round_iters=30, lr=3e-4, num_negatives=8, lam=1.0, gamma=0.5),
    "ml100k": dict(),
    "ml1m": dict(sft_iters=8000, eval_every=500, batch_size=32),
    "scratch": dict(dim=160, n_layers=3, n_heads=5, dropout=0.2, sft_full=True, history=30,
                    sft_window=31, sft_iters=2700, sft_lr=2e-3, eval_every=300, weight_decay=0.1,
                    lr=1.5e-3, round_iters=80, gamma=0.8, game_dropout=True),
}
# what a baseline or an ablation changes, over the same loop
METHODS = {
    "ufo": {},
    "sft-more": dict(loss="sft", gamma=0.0, num_negatives=1),   # the log-loss in the game's place
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
    holdout=1, max_users=0, train_users=0, eval_users=0, vocab_users=0, history=1, topk=1,
    batch_size=1, eval_batch=1, dropout=0, lora_rank=1, sft_window=2, seed=0, save_every=0,
    weight_decay=0, sft_iters=0, eval_every=1, patience=0, pretrain_iters=0, rounds=0,
    round_iters=1, branches=1, num_negatives=1, gamma=0, alpha=0, dim=2, n_layers=1, n_heads=1)


# options that do not change a result: where it is kept and told, how safely, in how much memory
PLACES = ("out_dir", "data_dir", "resume", "sft_from", "save_every", "track", "recompute")
# those that --sft_from leaves free: what is measured, and the game
MEASURED = ("group_by", "target", "eval_users", "vocab_users")
GAME = tuple(itertools.dropwhile(lambda k: k != "method", Config.__dataclass_fields__))


def nearest(word, options):
    close = difflib.get_close_matches(word, options, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(options)}"


def parse(argv, options):
    """['--key=value', ...] -> {key: value} with the types of the fields of the dataclass `options`;
    --key alone is --key=True for a bool. InputError in a line.
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


def check(options, kind=Config):
    """{field: value} -> a `kind`. InputError where it has no such field, or a value is not among
    the field's CHOICES or is under its AT_LEAST.
    """
    if unknown := set(options) - set(kind.__dataclass_fields__):
        raise data.InputError(f"{options.get('out_dir')}: begun with an option {min(unknown)}, "
                              f"which this version lacks; use the version it was begun with")
    cfg = kind(**options)
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
    cfg = check(preset | typed | {"out_dir": str(out)})
    for key in ("temperature", "sft_lr", "lr", "pretrain_lr", "lam"):
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


def exit_code(work, *args):
    """work(*args), where what the user can mend becomes one line on stderr. -> the exit code."""
    try:
        work(*args)
        return 0
    except (data.InputError, torch.OutOfMemoryError, OSError) as e:
        why = str(e).partition("\n")[0]
        if isinstance(e, torch.OutOfMemoryError):
            why += (" Lower --batch_size (training) or --eval_batch (search and play), or go on "
                    "with --resume --recompute=True")
        elif isinstance(e, OSError):
            why = f"{e.filename}: {e.strerror}" if e.filename else e.strerror or why
        print(f"error: {why}", file=sys.stderr)
        return 2
    except (machine.Stopped, KeyboardInterrupt) as e:
        print(f"\n{str(e) or 'stopped before there was anything new to save'}")
        return 130
