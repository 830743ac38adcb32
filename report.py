"""What is said of a run, and of a grid of runs: tables and, where matplotlib is, figures.

    python report.py out/ml100k             draw a run's exposure by group again
    python report.py results/toy.json       the table and the figures of a grid (`grid.py --save`)

A run's stages are rows (`train.Run.record`): what was measured of one policy on one split.
"""

import dataclasses
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

import data
import judger
import machine
import metrics
from config import PLACES, exit_code
from model import save_peft


def origin_report(run, pre, sft, end):
    """Equation (5), per group and in words. -> the `origins` of results.json."""
    ds, history = run.ds, run.cfg.history
    user, shown, _ = run.cases["test"]
    star, E_pre, E_sft, E_ufo = map(np.array, (sft["E_star"], pre["E"], sft["E"], end["E"]))
    o = judger.origins(star, E_pre, E_sft)
    shown = [h[-history:] for h in shown]
    sums = [metrics.group_sums(ds.credit, x) for x in (shown, pre["lists"], sft["lists"])]
    debiased, ci = judger.covariance_debiased(*sums, user)
    print(f"\nWhere the unfairness comes from (test; exposure in per cent; pretrained: "
          f"over={pre['over']})")
    print(f"{'group':>14} {'E*':>7} {'E_pre':>7} {'E_sft':>7} {'E_ufo':>7} {'b':>7} {'shift':>7}")
    for g in np.argsort(-o["b"]):
        shares = " ".join(f"{100 * x[g]:7.2f}" for x in (star, E_pre, E_sft, E_ufo))
        print(f"{ds.groups[g]:>14} {shares} {100 * o['b'][g]:+7.2f} {100 * o['shift'][g]:+7.2f}")
    verb = ("amplified" if ci[0] > 0 else "worked against" if ci[1] < 0
            else "neither clearly amplified nor worked against")
    print(f"SFT {verb} the pretraining bias: Cov(b, shift) = {debiased:+.2e} [{ci[0]:+.2e}, "
          f"{ci[1]:+.2e}] without noise bias (plain {o['covariance']:+.2e}, correlation "
          f"{o['correlation']:+.2f})")
    found = {"groups": ds.groups, "E_star": star.tolist(), "E_pre": E_pre.tolist(),
             "E_sft": E_sft.tolist(), "E_ufo": E_ufo.tolist(), "b": o["b"].tolist(),
             "shift": o["shift"].tolist(), "covariance": debiased, "covariance_ci": ci,
             "covariance_plain": o["covariance"], "correlation": o["correlation"],
             "over": pre["over"]}
    if ds.planted is not None and run.cfg.group_by == "genre":
        rank = lambda x: np.argsort(np.argsort(x))
        agree = float(np.corrcoef(rank(o["b"]), rank(ds.planted))[0, 1])
        found |= {"planted": ds.planted.tolist(), "planted_rank_correlation": agree}
        print(f"the judger's b against the planted skew of the web corpus: rank correlation "
              f"{agree:.2f}")
    return found


def results_table(rows, yardsticks, k):
    """The table by stage, with 95 % intervals over users."""
    names = [f"HR@{k}", f"NDCG@{k}", f"MGU@{k}", f"DGU@{k}", "log_loss"]
    print(f"\n{'test':>17} | " + " | ".join(f"{n:^22}" for n in names) + " | coverage | minutes")
    for stage, row in [*yardsticks.items(), *((r["stage"], r) for r in rows)]:
        cells = [f"{row[n]:.4f} [{row['ci'][n][0]:.4f}, {row['ci'][n][1]:.4f}]" if "ci" in row
                 else f"{row[n]:.4f}" if n in row else "" for n in names]
        print(f"{stage:>17} | " + " | ".join(f"{c:22}" for c in cells)
              + (f" | {row['coverage']:8.3f}" if "coverage" in row else " |         ") +
              (f" | {row['minutes']:7.1f}" if "minutes" in row else " |")
              + ("  !! COLLAPSED" if row.get("collapsed") else ""))
    print(f"MGU of a perfectly fair policy would read about {rows[-1]['MGU_floor']:.4f} here, from "
          f"sampling noise alone")


def example_lists(run, sft, end, n=3):
    """Three users' lists before and after, with what they watched last."""
    ds, (_, history, target) = run.ds, run.cases["test"]
    groups = lambda i: ", ".join(g for g, c in zip(ds.groups, ds.credit[i]) if c)
    about = lambda i: f"{ds.titles[i]} ({groups(i)})"
    for case in np.linspace(0, len(target) - 1, n).astype(int):
        print(f"\nuser {ds.users[run.cases['test'][0][case]]} watched ... "
              f"{'; '.join(about(i) for i in history[case][-4:])}; next was {about(target[case])}")
        for name, row in (("sft", sft), (end["stage"], end)):
            print(f"  {name:>6}: " + "; ".join(("*" if i == target[case] else "") + about(i)
                                               for i in row["lists"][case][:5]))


def choose(rows, k):
    """The stage to ship, by validation rows alone (SFT's first): of those whose NDCG is not
    established to be under SFT's (the paired 95 % interval reaches 0), the one with the least MGU.
    """
    good = [r for r in rows if r["less_sft"][f"NDCG@{k}"][2] >= 0]
    return min(good, key=lambda r: r[f"MGU@{k}"])["stage"]


def kept(chosen, rounds):
    """The stage that model.pt holds: the one that validation chose, the last round if that is SFT.
    """
    return chosen if chosen != "sft" or not rounds else f"ufo-{rounds}"


def finish(run, end):
    """The reports, results.json, model.pt and, with matplotlib, exposure.png; the checkpoints go.
    end: the stage that is kept.
    """
    cfg, k = run.cfg, f"MGU@{run.cfg.topk}"
    rows = [row for row in run.state["measured"].values() if row["split"] == "test"]
    stages = {row["stage"]: row for row in rows}
    yardsticks, chosen = run.yardsticks(), run.chosen()
    origins = origin_report(run, stages["pretrained"], stages["sft"], stages[end])
    example_lists(run, stages["sft"], stages[end])
    results_table(rows, yardsticks, cfg.topk)
    strip = lambda row: {key: v for key, v in row.items() if key not in ("lists", "minutes")}
    plain = [strip(row) for row in rows]
    for row, full in zip(plain, rows):
        if "less_sft" in row and "sft+rerank" in stages:
            row["less_rerank"] = run.difference(full, stages["sft+rerank"])
    results = {
        "config": {key: v for key, v in dataclasses.asdict(cfg).items() if key not in PLACES},
        "versions": machine.versions(run), "origins": origins, "yardsticks": yardsticks,
        "rows": plain, "chosen": chosen, "rounds": run.state["rounds"],
        "skipped_steps": run.state["skipped"],
        "validation": [strip(r) for r in run.state["measured"].values() if r["split"] == "val"]}
    model = io.BytesIO()                # torch's own writing to a full disk is no OSError
    torch.save({"config": dataclasses.asdict(cfg)} | run.weights(), model)
    try:
        if cfg.init_from != "scratch":
            # a stand-in is not what init_from names: say which
            base = run.source if "==" in run.source else cfg.init_from
            save_peft(run.policies.tuned, "player", run.out / "adapter", base,
                      run.source.partition("@")[2] or None)
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
        draw_exposure(results, run.out / "exposure.png")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if run.compile else 0
    memory = machine.peak_memory(run.device)
    run.log(event="done", compiled_graphs=graphs, peak_memory_gib=memory)
    for path in run.out.glob("checkpoint*.pt"):
        path.unlink()
    print(f"by validation, {chosen} is the one to choose; model.pt holds SFT and {end}")
    print(f"{k}: {stages[end][k] / stages['sft'][k] - 1:+.0%} against SFT; {run.minutes():.1f} "
          f"minutes in all, at most {memory:.1f} GiB, {graphs} compiled graphs, "
          f"{run.state['skipped']} steps left out for overflow; results in {run.out}/results.json")


# ---------------------------------------------------------------------- a grid of runs

def cells(found):
    """{"<cell>-<seed>": results} -> {cell: its seeds' results}, sorted by name. That a cell is also
    re-ranked at its end does not make it another.
    """
    grid = {}
    for name in sorted(found):
        cell = name.rpartition("-")[0].replace("+rerank=True", "")
        grid.setdefault(cell, []).append(found[name])
    return grid


def methods(found, group="genre"):
    """Of the cells of one grouping, those that have all seeds (means of others are of other runs)
    and no options of their own, if there are such -> {method: its seeds' results}, seeds.
    """
    own = {name: x for name, x in found.items() if x["config"]["group_by"] == group}
    grid = {cell.replace(f"+group_by={group}", ""): runs for cell, runs in cells(own).items()}
    grid = {cell: runs for cell, runs in grid.items() if "+" not in cell} or grid
    most = max(map(len, grid.values()))
    return {cell: runs for cell, runs in grid.items() if len(runs) == most}, most


def reranked(results):
    """The test row of a run's last stage with the group bias on top."""
    return next(r for r in results["rows"] if r["stage"].startswith("ufo")
                and r["stage"].endswith("+rerank"))


def row_of(results, stage=None):
    """A run's test row of a stage; by default the one that counts: the round that validation
    chose, or the re-ranked lists where that is the method.
    """
    stage = stage or ("sft+rerank" if results["config"]["method"] == "rerank"
                      else results["chosen"])
    return next(r for r in results["rows"] if r["stage"] == stage)


def table(found):
    """Markdown of a grid. Mean and standard deviation over seeds on the test item; and the
    difference to the same run's SFT, paired by user: its mean and deviation over seeds, with the
    mean of the seeds' 95 % bootstrap intervals over users. A cell's row is of the rounds that
    validation chose, "SFT in n" says for how many seeds that is SFT itself; the last round's row
    chooses nothing. Below it, likewise: the cells that are re-ranked too, less SFT re-ranked.
    """
    grid = cells(found)
    k = next(iter(found.values()))["config"]["topk"]
    names = [f"{m}@{k}" for m in ("HR", "NDCG", "MGU", "DGU")]
    short = lambda x, form=".4f": re.sub(r"^([+-]?)0\.", r"\1.", format(x, form))

    def mean(values, form=".4f"):
        return short(np.mean(values), form) + (
            " ± " + short(np.std(values, ddof=1)) if len(values) > 1 else "")

    def less(rows, m, other="less_sft"):
        by_seed, *ends = np.transpose([r[other][m] for r in rows])
        low, high = (short(x.mean(), "+.4f") for x in ends)
        return f"{mean(by_seed, '+.4f')} [{low}, {high}]"
    head = [*names, "coverage", "log_loss", *(f"{m} less SFT" for m in names[:3])]
    lines = [f"| method | seeds | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    sft = {}
    for x in found.values():
        group = x["config"]["group_by"]
        sft.setdefault("sft" if group == "genre" else f"sft+group_by={group}", {})[
            x["config"]["seed"]] = row_of(x, "sft")
    lists = {name: list(rows.values()) for name, rows in sft.items()}
    stayed, notes = {}, []
    for cell, runs in grid.items():
        lists[cell], game = [row_of(x) for x in runs], runs[0]["config"]
        if game["rounds"]:
            stayed[cell] = sum(x["chosen"] == "sft" for x in runs)
            lists[f"{cell}, last round"] = [row_of(x, f"ufo-{game['rounds']}") for x in runs]
            if game["rerank"]:
                lists[f"{cell}, then rerank"] = [reranked(x) for x in runs]
                group = game["group_by"]
                lists.setdefault("rerank" if group == "genre" else f"rerank+group_by={group}",
                                 [row_of(x, "sft+rerank") for x in runs])
                for name in (cell, f"{cell}, last round"):
                    found = (f"{m} {less(lists[name], m, 'less_rerank')}" for m in names[:3])
                    notes.append(f"{name}, less rerank: {'; '.join(found)}")
    for cell, rows in lists.items():
        text = [mean([r[m] for r in rows]) for m in (*names, "coverage", "log_loss")]
        text += [less(rows, m) if cell not in sft else "" for m in names[:3]]
        seeds = f"{len(rows)}, SFT in {n}" if (n := stayed.get(cell)) else len(rows)
        lines.append(f"| {cell} | {seeds} | " + " | ".join(text) + " |")
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def save(found, path):
    """A grid's results in one JSON file, numbers to six digits."""
    short = lambda x: ({k: short(v) for k, v in x.items()} if isinstance(x, dict) else
                       [short(v) for v in x] if isinstance(x, list) else
                       float(f"{x:.6g}") if isinstance(x, float) else x)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(short(found[name]))}" for name in sorted(found)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ---------------------------------------------------------------------- figures

INK = {"history": "#222222", "pretrained": "#8a8f98", "sft": "#d1495b", "ufo": "#00798c"}


def canvas(width, height):
    """-> (figure, axes), or InputError where matplotlib is not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise data.InputError("figures need matplotlib: pip install matplotlib") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def draw_exposure(results, path):
    """The picture of the method: every group's share of the lists, pretrained, fine-tuned and after
    the game, against its share of the histories.
    """
    o, k = results["origins"], results["config"]["topk"]
    order = np.argsort(o["E_star"])
    fig, ax = canvas(7.5, 1.6 + 0.26 * len(order))
    x = {name: 100 * np.array(o[name])[order] for name in ("E_star", "E_pre", "E_sft", "E_ufo")}
    y = np.arange(len(order))
    ax.hlines(y, x["E_star"], x["E_sft"], color=INK["sft"], lw=1.2, alpha=0.5)
    ax.hlines(y, x["E_star"], x["E_ufo"], color=INK["ufo"], lw=3.5, alpha=0.6)
    ax.plot(x["E_star"], y, "|", color=INK["history"], ms=13, mew=2.2, label="users' histories")
    ax.plot(x["E_pre"], y, "o", mfc="none", color=INK["pretrained"], ms=6, label="pretrained")
    ax.plot(x["E_sft"], y, "o", color=INK["sft"], ms=6, label="fine-tuned (SFT)")
    end = kept(results["chosen"], results["config"]["rounds"])
    ax.plot(x["E_ufo"], y, "D", color=INK["ufo"], ms=5.5, label=f"after self-play ({end})")
    ax.set_yticks(y, [o["groups"][g] for g in order])
    ax.set_xlabel("share of all places, per cent")
    mgu = [100 * row_of(results, s)[f"MGU@{k}"] for s in ("sft", end)]
    ax.set_title(f"{results['config']['dataset']}: who is shown in the top {k}? MGU@{k} "
                 f"{mgu[0]:.2f} → {mgu[1]:.2f} per cent", loc="left", fontsize=11)
    ax.grid(axis="x", color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4,
               loc="outside lower center")
    fig.savefig(path, dpi=150)


def draw_tradeoff(found, path, group="genre"):
    """MGU against HR, means over seeds, with the standard error of the difference to the seed's own
    SFT: the rounds of ufo as a line, the last round of every other method, and the group bias, as a
    point. Of one grouping: MGU of another is another figure.
    """
    grid, seeds = methods(found, group)
    k = next(iter(found.values()))["config"]["topk"]
    fig, ax = canvas(7.5, 5)

    def place(row):
        return np.array([100 * row[f"MGU@{k}"], row[f"HR@{k}"]])

    def put(runs, find, name, color, marker, label_at=(6, 5)):
        x, y = at = np.mean([place(find(r)) for r in runs], axis=0)
        gain = np.array([place(find(r)) - place(row_of(r, "sft")) for r in runs])
        dx, dy = gain.std(0, ddof=len(runs) > 1) / len(runs) ** 0.5
        ax.errorbar(x, y, dy, dx, fmt=marker, color=color, ms=7, lw=0.8, alpha=0.9)
        ax.annotate(name, at, xytext=label_at, textcoords="offset points", fontsize=8.5,
                    color=color)
        return at
    for cell, runs in grid.items():
        last = runs[0]["config"]["rounds"]
        if cell == "ufo":
            line = [put(runs, lambda r: row_of(r, "sft"), "SFT", INK["sft"], "o")]
            line += [put(runs, lambda r: row_of(r, f"ufo-{t}"), f"ufo-{t}", INK["ufo"], "D",
                         (6, -13)) for t in range(1, last + 1)]
            ax.plot(*np.transpose(line), "-", color=INK["ufo"], lw=1.5, zorder=1)
        else:
            put(runs, lambda r: row_of(r, f"ufo-{last}" if last else None), cell,
                INK["pretrained"], "s")
        if runs[0]["config"]["rerank"] and last:
            put(runs, lambda r: row_of(r, "sft+rerank"), "rerank", INK["history"], "s", (6, -12))
            put(runs, reranked, f"{cell}, then rerank", INK["history"], "s")
    ax.set_xlabel(f"MGU@{k} by {group}, per cent (left is fairer)")
    ax.set_ylabel(f"HR@{k} (up is better)")
    ax.set_title(f"Unfairness and accuracy on the test item, seeds: {seeds} (bars: standard error "
                 f"of the way from SFT)", loc="left", fontsize=10)
    fig.savefig(path, dpi=150)


def draw_judger(found, path, group="genre"):
    """How often the judger tells a user's item from one that the opponent made up, by round; 1/2
    ends the game.
    """
    fig, ax = canvas(7.5, 3.6)
    for cell, runs in methods(found, group)[0].items():
        game = runs[0]["config"]
        if game["rounds"] and game["loss"] != "sft" and game["negatives"] == "sampled":
            mean = np.mean([[r["judger_accuracy"] for r in x["rounds"]] for x in runs], axis=0)
            style = dict(color=INK["ufo"], zorder=3) if cell == "ufo" else {}
            ax.plot(range(1, len(mean) + 1), mean, "o-", ms=5, label=cell, **style)
    ax.axhline(0.5, color=INK["history"], lw=0.8, ls=":")
    ax.set_xlabel("round")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=9)
    ax.set_title("The judger's accuracy (mean over a round's steps); 1/2 is the game's end",
                 loc="left", fontsize=11)
    fig.savefig(path, dpi=150)


def main(path):
    path = Path(path)
    source = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(source.read_text())
    except (OSError, ValueError) as e:
        raise data.InputError(f"{source}: {getattr(e, 'strerror', None) or e}; name a run's folder "
                              f"or a file of grid.py --save") from None
    if "rows" in found:
        return draw_exposure(found, path / "exposure.png")
    print(table(found))
    for group in sorted({x["config"]["group_by"] for x in found.values()}):
        of = "" if group == "genre" else f"-{group}"
        for draw in (draw_tradeoff, draw_judger):
            draw(found, path.with_name(f"{path.stem}-{draw.__name__[5:]}{of}.png"), group)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1] if len(sys.argv) == 2 else "")))
