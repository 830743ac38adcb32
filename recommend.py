"""Ask a trained recommender: the same history, three lists.

    python recommend.py --out_dir=out/ml100k "Toy Story (1995)" "Heat (1995)"
    python recommend.py --out_dir=out/ml100k --user=189
    python recommend.py --out_dir=out/toy --json ...

Prints the top K of the pretrained, the fine-tuned (SFT) and the UFO model side by side, each title
with its probability q(y|x) of (1) and its groups, and what share of every list each group takes,
beside its share of the history (2), (3). Titles are matched without regard to case, accents,
punctuation and the place of the article; the year is needed only where two titles would else be the
same.
"""

import contextlib
import difflib
import json
import sys
import unicodedata
from dataclasses import dataclass

from train import trained       # before torch, for how its threads wait

import numpy as np
import torch

import data
import metrics
from config import check, exit_code, parse

POLICIES = {"pretrained": "pretrained", "sft": "sft", "ufo": "player"}


@dataclass
class Ask:
    out_dir: str = "out/toy"    # where train.py left model.pt
    user: str = ""              # a user of the data set, instead of titles
    topk: int = 10              # length of the lists
    json: bool = False          # one JSON object on stdout, for programs


def plain(title):
    """A title as it is compared: natural order, no accents, case or punctuation."""
    text = unicodedata.normalize("NFKD", data.natural(title.title())).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text
                            if not unicodedata.combining(c)).split())


def find(title, titles, years):
    """The number of the title that is meant. InputError with suggestions where there is none or
    more than one.
    """
    name, year = data.split_year(title)
    full = [plain(t) for t in titles]
    bare = [plain(data.split_year(t)[0]) for t in titles]
    fits = lambda i: bare[i] == plain(name) and (not year or years[i] in (None, year))
    found = [i for i, t in enumerate(full) if t == plain(title)] or [
        i for i in range(len(titles)) if fits(i)]
    if len(found) == 1:
        return found[0]
    if found:
        raise data.InputError(f"{title!r} may be {' or '.join(titles[i] for i in found)}: add the "
                              f"year")
    close = difflib.get_close_matches(plain(name), bare, 3)
    raise data.InputError(f"no title {title!r} in the catalog" + (
        f"; did you mean {' or '.join(titles[bare.index(c)] for c in close)}?" if close else ""))


@torch.no_grad()
def recommend(run, history, k):
    """history: items, oldest first -> {"pretrained" | "sft" | "ufo": ([items], [probabilities])},
    what was seen left out.
    """
    lists = {}
    for name, policy in POLICIES.items():
        search, seen = run.search(policy, [history])
        items, logq, _ = search.top_k(k, seen, run.search_width(1))
        kept = items[0] >= 0
        lists[name] = items[0][kept].tolist(), logq[0][kept].exp().tolist()
    return lists


def answer(run, history, k):
    """`recommend` in words: titles, probabilities, groups, and the groups' shares."""
    ds, shown = run.ds, history[-run.cfg.history:]
    groups = lambda i: [g for g, c in zip(ds.groups, ds.credit[i]) if c]
    share = lambda items: dict(zip(ds.groups, metrics.exposure(*metrics.group_sums(
        ds.credit, [np.asarray(items, int)])).tolist() if len(items) else [0.0] * len(ds.groups)))
    lists = recommend(run, history, k)
    return {"history": [ds.titles[i] for i in shown],
            "lists": {name: [{"title": ds.titles[i], "probability": p, "groups": groups(i)}
                             for i, p in zip(*found)] for name, found in lists.items()},
            "exposure": {"history": share(shown)} | {name: share(found[0])
                                                     for name, found in lists.items()}}


def show(a):
    """The answer as two tables."""
    print(f"history: {'; '.join(a['history'])}\n")
    cut = lambda text, n: text if len(text) <= n else text[:n - 1] + "…"
    line = lambda x: f"{x['probability']:7.2%} {cut(x['title'], 28)} ({', '.join(x['groups'])})"
    print("   " + "".join(f"{name:<52}" for name in a["lists"]).rstrip())
    for n, row in enumerate(zip(*a["lists"].values()), 1):
        print(f"{n:2} " + "".join(f"{cut(line(x), 50):<52}" for x in row).rstrip())
    print(f"\n{'share of':>20} " + "".join(f"{name:>11}" for name in a["exposure"]))
    for g in sorted(a["exposure"]["history"], key=a["exposure"]["history"].get, reverse=True):
        if any(e[g] for e in a["exposure"].values()):
            print(f"{g:>20} " + "".join(f"{e[g]:11.1%}" for e in a["exposure"].values()))


def main(argv):
    cfg = check(parse([a for a in argv if a.startswith("--")], Ask), Ask)
    titles = [a for a in argv if not a.startswith("--")]
    if bool(titles) == bool(cfg.user):
        raise data.InputError('give the titles of a history ("Heat (1995)" ...), or --user=ID')
    with contextlib.redirect_stdout(sys.stderr):            # only the answer goes to stdout
        run = trained(cfg.out_dir)
    names = [str(u) for u in run.ds.users]
    if cfg.user and cfg.user not in names:
        raise data.InputError(f"--user={cfg.user}: not a user of {run.cfg.dataset} (such as "
                              f"{', '.join(names[:3])})")
    if cfg.topk >= len(run.ds.titles):
        raise data.InputError(f"--topk={cfg.topk}: the catalog has {len(run.ds.titles)} titles")
    history = (run.ds.histories[names.index(cfg.user)].tolist() if cfg.user else
               [find(t, run.ds.titles, run.ds.years) for t in titles])
    a = answer(run, history, cfg.topk)
    print(json.dumps(a)) if cfg.json else show(a)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
