"""Run a grid of methods and seeds, and make a table of it.

    python grid.py --methods=ufo,sft-more,rerank --seeds=0,1,2 --dataset=toy
    python grid.py --methods=ufo,ufo+gamma=0.2,ufo+gamma=0.8 --dataset=toy      an ablation
    python grid.py --table=True --grid_dir=out/grid      the table of what is there, nothing run

A cell is a method, with options of its own after a +. Every other option goes to train.py. Each run
has a folder grid_dir/<dataset>/<cell>-<seed>; one that is finished is left alone and one that was
stopped goes on, so the same command after an interruption takes up the grid where it was. The cells
of a seed share one SFT, the first cell's (`train.py --sft_from`). The table (`report.table`) is
printed, and the figures kept with --save=FILE.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import data
import report
from config import GAME, MEASURED, METHODS, PLACES, Config, configure, exit_code, nearest, parse


@dataclass
class Grid:
    methods: str = "ufo"        # names in config.METHODS, with +options, separated by commas
    seeds: str = "0,1,2"
    dataset: str = "toy"
    grid_dir: str = "out/grid"
    table: bool = False         # only make the table
    save: str = ""              # a JSON file for the figures of all cells


def launch(command, log):
    """Run a command to its end, also through Ctrl-C, which it too gets and saves itself on."""
    with subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def run(cfg, cell, seed, rest):
    """One run: train.py in its own folder, unless it is finished. Its output is kept in run.log.
    What makes the cell what it is wins over the options given for all. InputError where a finished
    run has other options, or the run fails.
    """
    method, *own = cell.split("+")
    own = [f"--{x}" for x in own]
    folder = Path(cfg.grid_dir) / Path(cfg.dataset).resolve().name
    out = folder / f"{cell}-{seed}"
    key = lambda arg: arg.partition("=")[0][2:]
    rest = own + [a for a in rest if key(a) not in {*METHODS[method], *map(key, own)}]
    rest += [f"--dataset={cfg.dataset}", f"--method={method}", f"--seed={seed}", f"--out_dir={out}"]
    if (out / "results.json").exists():
        was = json.loads((out / "results.json").read_text())["config"]
        other = [f"{k} was {was[k]}" for k, v in dataclasses.asdict(configure(rest)).items()
                 if k not in PLACES and was.get(k, v) != v]
        if other:
            raise data.InputError(f"{out} was run with other options: {', '.join(other)}; use "
                                  f"another --grid_dir")
        return
    out.mkdir(parents=True, exist_ok=True)
    begun = any((out / f"checkpoint{x}.pt").exists() for x in ("", ".previous"))
    sft = next((p.parent for p in sorted(folder.glob(f"*-{seed}/sft.pt")) if p.parent != out), None)
    print(f"{out}: {'going on' if begun else f'begun on the SFT of {sft}' if sft else 'begun'}",
          flush=True)
    with open(out / "run.log", "a") as log:
        code = launch([sys.executable, str(Path(__file__).parent / "train.py"), *rest,
                       *["--resume"] * begun, *[f"--sft_from={sft}"] * bool(sft)], log)
    if code:
        raise data.InputError(f"{out}: train.py ended with {code}; see run.log there")


def main(argv):
    own = tuple(f"--{k}" for k in Grid.__dataclass_fields__)
    cfg = Grid(**parse([a for a in argv if a.partition("=")[0] in own], Grid))
    rest = [a for a in argv if a.partition("=")[0] not in own]
    cells, fixed = cfg.methods.split(","), {"method", "dataset", "seed", "out_dir"}
    if twice := fixed & set(parse(rest, Config)):
        raise data.InputError(f"--{min(twice)}: a grid has --methods, --seeds and --grid_dir")
    for method, *options in (cell.split("+") for cell in cells):
        if method not in METHODS:
            raise data.InputError(f"--methods: {method}: not known{nearest(method, METHODS)}")
        own = set(parse([f"--{x}" for x in options], Config))
        if other := own - (set(GAME + MEASURED) - fixed):       # the cells of a seed share its SFT
            raise data.InputError(f"--methods: +{min(other)} cannot be a cell's own; give it to all")
    if not all(s.isdigit() for s in cfg.seeds.split(",")):
        raise data.InputError(f"--seeds={cfg.seeds}: expected whole numbers and commas")
    if not cfg.table:
        for seed in cfg.seeds.split(","):
            for cell in cells:
                run(cfg, cell, seed, rest)
    folder = Path(cfg.grid_dir) / Path(cfg.dataset).resolve().name
    found = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/results.json")}
    if not found:
        raise data.InputError(f"{folder}: no results in it yet")
    if cfg.save:
        report.save(found, Path(cfg.save))
    print(report.table(found))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
