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
from config import MEASURED, PLACES, exit_code
from model import save_peft


def origin(run, pre, sft):
    """(5) of two test rows, on the users of `pre` -> a dict of plain numbers, per group and in all,
    and a sentence on Cov(b, shift).
    """
    cases, ds, fair = run.cases["test"], run.ds, judger.TARGETS[run.cfg.target]
    n = run.cfg.vocab_users if pre["over"] == "vocab" else 0
    user, history, _ = data.spaced(cases, n)
    _, lists, _ = data.spaced((cases[0], sft["lists"], cases[2]), n)
    sums = [metrics.group_sums(ds.credit, x) for x in (run.shown(history), pre["lists"], lists)]
    star, E_pre, E_sft = (metrics.exposure(*x) for x in sums)
    o = judger.origins(fair(star), E_pre, E_sft)
    debiased, ci = judger.covariance_debiased(*sums, user, fair)
    verb = ("amplified" if ci[0] > 0 else "worked against" if ci[1] < 0
            else "neither clearly amplified nor worked against")
    found = {"over": pre["over"], "E_star": fair(star).tolist(), "E_pre": E_pre.tolist(),
             "E_sft": E_sft.tolist(), "b": o["b"].tolist(), "shift": o["shift"].tolist(),
             "covariance": debiased, "covariance_ci": ci, "covariance_plain": o["covariance"],
             "correlation": o["correlation"]}
    text = (f"SFT {verb} the pretraining bias (over={pre['over']}, {len(np.unique(user))} users): "
            f"Cov(b, shift) = {debiased:+.2e} [{ci[0]:+.2e}, {ci[1]:+.2e}] without noise bias "
            f"(plain {o['covariance']:+.2e}, correlation {o['correlation']:+.2f})")
    if ds.planted is not None and run.cfg.group_by == "genre":
        rank = lambda x: np.argsort(np.argsort(x))
        agree = float(np.corrcoef(rank(o["b"]), rank(ds.planted))[0, 1])
        found |= {"planted": ds.planted.tolist(), "planted_rank_correlation": agree}
        text += f"; b against the planted skew of the web corpus: rank correlation {agree:.2f}"
    return found, text


def origin_report(run, stages, end):
    """Equation (5), per group and in words, by the trie's softmax and, where it was measured, by
    the vocabulary's. -> the `origins` of results.json.
    """
    found, text = origin(run, stages["pretrained"], stages["sft"])
    found |= {"groups": run.ds.groups, "E_ufo": stages[end]["E"]}
    names = ("E_star", "E_pre", "E_sft", "E_ufo", "b", "shift")
    print("\nWhere the unfairness comes from (test; exposure in per cent; over=trie)")
    print(f"{'group':>14} " + " ".join(f"{name.replace('E_star', 'E*'):>7}" for name in names))
    for g in np.argsort(-np.array(found["b"])):
        shares = " ".join(f"{100 * found[x][g]:{'+' * (x in ('b', 'shift'))}7.2f}" for x in names)
        print(f"{run.ds.groups[g]:>14} {shares}")
    print(text)
    if "pretrained-vocab" in stages:
        found["vocab"], text = origin(run, stages["pretrained-vocab"], stages["sft"])
        print(text)
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
                                               for i in row["lists"][case][:5] if i >= 0))


def choose(rows, k):
    """The stage to ship, by validation rows alone (SFT's first): of those whose NDCG is not
    established to be under SFT's (the paired 95 % interval reaches 0), the one with the least MGU.
    """
    good = [r for r in rows if r["less_sft"][f"NDCG@{k}"][2] >= 0]
    return min(good, key=lambda r: r[f"MGU@{k}"])["stage"]


def kept(chosen, rounds):
    """The stage that model.pt holds, recommend.py shows as "ufo" and re-ranking comes on top of:
    the one that validation chose, or the last round where it chose SFT.
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
    origins = origin_report(run, stages, end)
    told = end if cfg.rounds else next(reversed(stages))        # without a game: re-ranking, if any
    example_lists(run, stages["sft"], stages[told])
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
    torch.save({"config": dataclasses.asdict(cfg), "made_of": run.made_of()} | run.weights(), model)
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
    print(f"by validation, {chosen} is the one to choose; model.pt holds SFT"
          f"{f' and {end}' if end != 'sft' else ''}")
    print(f"{k} of {told}: {stages[told][k] / stages['sft'][k] - 1:+.0%} against SFT; "
          f"{run.minutes():.1f} minutes in all, at most {memory:.1f} GiB, {graphs} compiled graphs, "
          f"{run.state['skipped']} steps left out for overflow; results in {run.out}/results.json")


# ---------------------------------------------------------------------- a grid of runs

def cells(found):
    """{"<method>+<options>-<seed>": results} -> {(cell, measured): {seed: results}}, sorted.
    measured: those of a cell's options that say what is measured ("+group_by=popularity"), so that
    cells with the same `measured` share the rows of SFT and of re-ranking. That a cell is also
    re-ranked at its end does not make it another.
    """
    grid = {}
    for name in sorted(found):
        cell, _, seed = re.sub(r"\+rerank(=True)?(?=[+-])", "", name).rpartition("-")
        measured = "".join(f"+{x}" for x in cell.split("+")[1:] if x.partition("=")[0] in MEASURED)
        runs = grid.setdefault((cell, measured), {})
        if seed not in runs or "+rerank" in name:
            runs[seed] = found[name]
    return grid


def rows_of(runs, stage):
    """{seed: test row} of a stage in those of the runs ({seed: results}) that have it. stage: a
    name, or a function of results that gives one.
    """
    name = stage if callable(stage) else lambda _: stage
    found = {seed: [r for r in x["rows"] if r["stage"] == name(x)] for seed, x in runs.items()}
    return {seed: rows[0] for seed, rows in found.items() if rows}


def last(results):
    return f"ufo-{results['config']['rounds']}"


def reranked(results):
    """A run's kept stage with the group bias on top."""
    return f"{kept(results['chosen'], results['config']['rounds'])}+rerank"


def table(found):
    """Markdown of a grid. Mean and standard deviation over seeds on the test item; and the
    difference to the same run's SFT, paired by user: its mean and deviation over seeds, with the
    mean of the seeds' 95 % bootstrap intervals over users. A cell's row is of the rounds that
    validation chose, "SFT in n" says for how many seeds that is SFT itself (whose interval is no
    width, so none is given); the last round's row chooses nothing. Below the table, likewise: the
    cells that are re-ranked too, less SFT re-ranked.
    """
    k = next(iter(found.values()))["config"]["topk"]
    names = [f"{m}@{k}" for m in ("HR", "NDCG", "MGU", "DGU")]
    short = lambda x, form=".4f": re.sub(r"^([+-]?)0\.", r"\1.", format(x, form))

    def mean(values, form=".4f"):
        return short(np.mean(values), form) + (
            " ± " + short(np.std(values, ddof=1)) if len(values) > 1 else "")

    def less(rows, m, other="less_sft", interval=True):
        by_seed, *ends = np.transpose([r[other][m] for r in rows.values()])
        low, high = (short(x.mean(), "+.4f") for x in ends)
        return mean(by_seed, "+.4f") + (f" [{low}, {high}]" if interval else "")
    references, games, notes = {}, {}, []           # name -> ({seed: row}, seeds where it is SFT)
    for (cell, measured), runs in cells(found).items():
        for name, stage in (("sft", "sft"), ("rerank", "sft+rerank")):
            if rows := rows_of(runs, stage):
                references.setdefault(name + measured, ({}, 0))[0].update(rows)
        if not any(x["config"]["rounds"] for x in runs.values()):
            continue
        stayed = sum(x["chosen"] == "sft" for x in runs.values())
        games[cell] = rows_of(runs, lambda x: x["chosen"]), stayed
        games[f"{cell}, last round"] = rows_of(runs, last), 0
        if rows := rows_of(runs, reranked):
            games[f"{cell}, then rerank"] = rows, 0
            for name in (cell, f"{cell}, last round"):
                both = {seed: r for seed, r in games[name][0].items() if "less_rerank" in r}
                text = "; ".join(f"{m} {less(both, m, 'less_rerank')}" for m in names[:3])
                notes.append(f"\n\n{name}, less rerank: {text}")
    head = [*names, "coverage", "log_loss", *(f"{m} less SFT" for m in names[:3])]
    lines = [f"| method | seeds | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    references = dict(sorted(references.items(), key=lambda x: x[0].startswith("rerank")))
    for name, (rows, stayed) in (references | games).items():
        text = [mean([r[m] for r in rows.values()]) for m in (*names, "coverage", "log_loss")]
        is_sft = name in references and name.startswith("sft")
        text += ["" if is_sft else less(rows, m, interval=not stayed) for m in names[:3]]
        seeds = f"{len(rows)}, SFT in {stayed}" if stayed else len(rows)
        lines.append(f"| {name} | {seeds} | " + " | ".join(text) + " |")
    return "\n".join(lines) + "".join(notes)


def save(found, path):
    """A grid's results in one JSON file, numbers to six digits."""
    short = lambda x: json.loads(json.dumps(x), parse_float=lambda f: float(f"{float(f):.6g}"))
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
    fair = {"history": "users' histories"}.get(results["config"]["target"], "fair")
    ax.plot(x["E_star"], y, "|", color=INK["history"], ms=13, mew=2.2, label=fair)
    ax.plot(x["E_pre"], y, "o", mfc="none", color=INK["pretrained"], ms=6, label="pretrained")
    ax.plot(x["E_sft"], y, "o", color=INK["sft"], ms=6, label="fine-tuned (SFT)")
    end = kept(results["chosen"], results["config"]["rounds"])
    if end != "sft":
        ax.hlines(y, x["E_star"], x["E_ufo"], color=INK["ufo"], lw=3.5, alpha=0.6)
        ax.plot(x["E_ufo"], y, "D", color=INK["ufo"], ms=5.5, label=f"after self-play ({end})")
    ax.set_yticks(y, [o["groups"][g] for g in order])
    ax.set_xlabel("share of all places, per cent")
    rows = {r["stage"]: r for r in results["rows"]}
    mgu = [100 * rows[s][f"MGU@{k}"] for s in ("sft", end)]
    ax.set_title(f"{results['config']['dataset']}: who is shown in the top {k}? MGU@{k} "
                 f"{mgu[0]:.2f} → {mgu[1]:.2f} per cent", loc="left", fontsize=11)
    ax.grid(axis="x", color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4,
               loc="outside lower center")
    fig.savefig(path, dpi=150)


def complete(found, measured):
    """Of the cells of one `measured`, those that have all seeds (means of others are of other
    runs): the methods with no options of their own but the number of rounds, if there are any
    -> {method + measured, or cell: runs}.
    """
    alike = {cell: runs for (cell, its), runs in cells(found).items() if its == measured}
    plain = {}
    for cell, runs in sorted(alike.items(), key=lambda x: x[0]):
        method = re.sub(r"\+rounds=\d+", "", cell).removesuffix(measured)
        if "+" not in method:
            plain.setdefault(method + measured, runs)       # of two numbers of rounds, the preset's
    grid = plain or alike
    most = max(map(len, grid.values()))
    return {cell: runs for cell, runs in grid.items() if len(runs) == most}


def write_names(fig, ax, points):
    """The names of points (x, y, name, color) beside them, each at the first place around it that
    is inside the axes and that no point and no other name has taken.
    """
    fig.draw_without_rendering()                            # the axes take their places
    inch = 72 / fig.dpi
    at = [ax.transData.transform(p[:2]) * inch for p in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]   # boxes, in points of 1/72 inch
    for (left, low), (x, y, name, color) in zip(at, points):
        wide = 4.8 * len(name)
        for dx, dy in ((6, 4), (6, -13), (-wide / 2, -17), (-wide / 2, 8), (-6 - wide, 4),
                       (-6 - wide, -13), (-wide / 2, 19)):
            x0, y0, x1, y1 = left + dx, low + dy, left + dx + wide, low + dy + 9
            if ax.bbox.x0 * inch < x0 and not any(
                    x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in taken):
                break
        taken.append((x0, y0, x1, y1))
        ax.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8.5,
                    color=color)


def draw_tradeoff(found, path, measured=""):
    """MGU against HR, means over seeds, with the standard error of the difference to the seed's own
    SFT: the rounds of ufo as a line, the last round of every other method, and the group bias, as a
    point. Of cells that are measured alike: MGU of other groups is another figure.
    """
    grid = complete(found, measured)
    runs = next(iter(grid.values()))
    k, seeds = next(iter(runs.values()))["config"]["topk"], len(runs)
    (fig, ax), points = canvas(7.5, 5), []

    def put(runs, stage, name, color, marker):
        place = lambda rows: np.array([[100 * r[f"MGU@{k}"], r[f"HR@{k}"]] for r in rows])
        rows = rows_of(runs, stage)
        if len(rows) < seeds:
            return None
        at, sft = place(rows.values()), rows_of(runs, "sft")
        x, y = at.mean(0)
        dx, dy = (at - place(sft[s] for s in rows)).std(0, ddof=seeds > 1) / seeds ** 0.5
        ax.errorbar(x, y, dy, dx, fmt=marker, color=color, ms=7, lw=0.8, alpha=0.9)
        points.append((x, y, name, color))
        return x, y
    start = put(runs, "sft", "SFT", INK["sft"], "o")
    biased = [runs for runs in grid.values() if len(rows_of(runs, "sft+rerank")) == seeds]
    if biased:
        put(biased[0], "sft+rerank", "rerank", INK["history"], "s")
    for cell, runs in grid.items():
        rounds = next(iter(runs.values()))["config"]["rounds"]
        if cell == "ufo" + measured:
            ways = [put(runs, f"ufo-{t + 1}", f"ufo-{t + 1}", INK["ufo"], "D")
                    for t in range(rounds)]
            ax.plot(*np.transpose([start, *ways]), "-", color=INK["ufo"], lw=1.5, zorder=1)
        elif rounds:
            put(runs, last, cell.removesuffix(measured), INK["pretrained"], "s")
        if rounds:
            put(runs, reranked, f"{cell.removesuffix(measured)}+rerank", INK["history"], "s")
    ax.set_xlabel(f"MGU@{k}{measured.replace('+', ', ')}, per cent (left is fairer)")
    ax.set_ylabel(f"HR@{k} (up is better)")
    ax.set_title(f"Unfairness and accuracy on the test item, seeds: {seeds} (bars: standard error "
                 f"of the way from SFT)", loc="left", fontsize=10)
    write_names(fig, ax, points)
    fig.savefig(path, dpi=150)


def draw_judger(found, path, measured=""):
    """How often the judger tells a user's item from one that the opponent made up, by round; 1/2
    ends the game.
    """
    fig, ax = canvas(7.5, 3.6)
    for cell, runs in complete(found, measured).items():
        runs = [x for x in runs.values() if x["config"]["negatives"] == "sampled"
                and x["config"]["loss"] != "sft" and x["rounds"]]
        if runs:
            mean = np.mean([[r["judger_accuracy"] for r in x["rounds"]] for x in runs], axis=0)
            style = dict(color=INK["ufo"], zorder=3) if cell == "ufo" + measured else {}
            ax.plot(range(1, len(mean) + 1), mean, "o-", ms=5, label=cell, **style)
    ax.axhline(0.5, color=INK["history"], lw=0.8, ls=":")
    ax.set_xlabel("round")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9)
    ax.set_title("The judger's accuracy (mean over a round's steps); 1/2 is the game's end",
                 loc="left", fontsize=11)
    fig.savefig(path, dpi=150)


def main(path):
    path = Path(path)
    source = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(source.read_text())
        if "rows" in found:
            return draw_exposure(found, source.with_name("exposure.png"))
        text = table(found)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
        raise data.InputError(f"{source}: {getattr(e, 'strerror', None) or repr(e)}; name a run's "
                              f"folder or a file of grid.py --save") from None
    print(text)
    for measured in sorted({measured for _, measured in cells(found)}):
        of = re.sub(r"\W+", "-", measured)
        for draw in (draw_tradeoff, draw_judger):
            draw(found, path.with_name(f"{path.stem}-{draw.__name__[5:]}{of}.png"), measured)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1] if len(sys.argv) == 2 else ""))
