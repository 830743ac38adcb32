"""Run a grid of methods and seeds, and make a table of it.

    python grid.py --methods=ufo,sft-more,rerank --seeds=0,1,2 --dataset=toy
    python grid.py --table=True --grid_dir=out/grid      the table of what is there, nothing run

Every other option goes to train.py. Each run has a folder grid_dir/<dataset>/<method>-<seed>; one
that is finished is left alone and one that was stopped goes on, so the same command after an
interruption takes up the grid where it was. The table (markdown) has a row a method: mean and
standard deviation over seeds on the test item, and the difference to the same run's SFT, paired by
user: its mean over seeds, and the mean of the seeds' 95 % bootstrap intervals over users. The round
is the one that each run chose by validation (`train.choose`).
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from train import METHODS, PLACES, Config, exit_code, nearest, parse


@dataclass
class Grid:
    methods: str = "ufo"        # names in train.METHODS, separated by commas
    seeds: str = "0,1,2"
    dataset: str = "toy"
    grid_dir: str = "out/grid"
    table: bool = False         # only make the table


def launch(command, log):
    """Run a command to its end, also through Ctrl-C, which it too gets and saves itself on."""
    with subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def run(cfg, method, seed, rest):
    """One cell: train.py in its own folder, unless it is finished. Its output is kept in run.log.
    What makes the method what it is wins over the options given for all. InputError where a
    finished cell has other options, or the run fails.
    """
    out = Path(cfg.grid_dir) / Path(cfg.dataset).resolve().name / f"{method}-{seed}"
    rest = [a for a in rest if a.partition("=")[0][2:] not in METHODS[method]]
    if (out / "results.json").exists():
        was = json.loads((out / "results.json").read_text())["config"]
        other = [f"{k} was {was.get(k)}" for k, v in parse(rest, Config).items()
                 if k not in PLACES and was.get(k) != v]
        if other:
            raise data.InputError(f"{out} was run with other options: {', '.join(other)}; use "
                                  f"another --grid_dir")
        return
    out.mkdir(parents=True, exist_ok=True)
    begun = any((out / f"checkpoint{x}.pt").exists() for x in ("", ".previous"))
    print(f"{out}: {'going on' if begun else 'begun'}", flush=True)
    with open(out / "run.log", "a") as log:
        code = launch([sys.executable, str(Path(__file__).parent / "train.py"), *rest,
                       f"--dataset={cfg.dataset}", f"--method={method}", f"--seed={seed}",
                       f"--out_dir={out}", *["--resume"] * begun], log)
    if code:
        raise data.InputError(f"{out}: train.py ended with {code}; see run.log there")


def picked(results):
    """The test row that counts: the round chosen by validation; re-ranked, if that is the method.
    """
    rows = {r["stage"]: r for r in results["rows"]}
    return rows["sft+rerank" if results["config"]["method"] == "rerank" else results["chosen"]]


def table(folder):
    """Markdown of all results.json one level under folder."""
    runs = {}
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text())
        runs.setdefault(results["config"]["method"], []).append(results)
    if not runs:
        raise data.InputError(f"{folder}: no results in it yet")
    k = next(iter(runs.values()))[0]["config"]["topk"]
    names = [f"{m}@{k}" for m in ("HR", "NDCG", "MGU", "DGU")]
    mean = lambda rows, m: (f"{np.mean([r[m] for r in rows]):.4f} ± "
                            f"{np.std([r[m] for r in rows], ddof=len(rows) > 1):.4f}")
    less = lambda rows, m: "{:+.4f} [{:+.4f}, {:+.4f}]".format(
        *np.mean([r["less_sft"][m] for r in rows], axis=0))
    head = [*names, "coverage", *(f"{m} less SFT" for m in names)]
    lines = [f"| method | seeds | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    everyone = [next(r for r in x["rows"] if r["stage"] == "sft") for x in runs.get(
        "ufo", next(iter(runs.values())))]
    for method, rows in [("sft", everyone), *((m, [picked(x) for x in xs]) for m, xs in
                                              runs.items())]:
        cells = [mean(rows, m) for m in (*names, "coverage")]
        cells += [less(rows, m) if method != "sft" else "" for m in names]
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv):
    own = tuple(f"--{k}" for k in Grid.__dataclass_fields__)
    cfg = Grid(**parse([a for a in argv if a.partition("=")[0] in own], Grid))
    rest = [a for a in argv if a.partition("=")[0] not in own]
    if twice := {"method", "seed", "out_dir"} & set(parse(rest, Config)):
        raise data.InputError(f"--{min(twice)}: a grid has --methods, --seeds and --grid_dir")
    for method in cfg.methods.split(","):
        if method not in METHODS:
            raise data.InputError(f"--methods: {method}: not known{nearest(method, METHODS)}")
    if not all(s.isdigit() for s in cfg.seeds.split(",")):
        raise data.InputError(f"--seeds={cfg.seeds}: expected whole numbers and commas")
    if not cfg.table:
        for seed in cfg.seeds.split(","):
            for method in cfg.methods.split(","):
                run(cfg, method, seed, rest)
    print(table(Path(cfg.grid_dir) / Path(cfg.dataset).resolve().name))


def cli(argv):
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
