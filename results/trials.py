"""Trials reported in results/README.md that are no options of train.py.

    python results/trials.py average --sft_from=DIR --out_dir=NEW   the player averaged over rounds
    python results/trials.py unseen  --sft_from=DIR --out_dir=NEW   judged on every other user only
    ... --loss=hard                                   more weight on what the judger gets wrong
    ... --loss=pairs                                  every made-up item a pair of its own
    python results/trials.py versus DIR OTHER ...     what finished runs kept, paired by user
    ... --group_by=popularity                         and measured by other groups

--sft_from: the folder of a run, whose SFT the game begins from. Other options as for train.py, but
--resume: a trial that was stopped starts anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train            # before torch, for how its threads wait

import numpy as np
import torch
import torch.nn.functional as F

import corrector
import data
import judger
import metrics
from config import Config, configure, exit_code, parse


def hard(f, weights):
    """(9) with each place's weight times the chance that the judger takes one of the made-up items
    for the user's: a focal loss (1708.02002, exponent 1). A round begins with all chances equal.
    """
    wrong = torch.sigmoid(torch.logsumexp(f[:, 1:] - f[:, :1], 1)).detach()
    return corrector.loss(f, weights * wrong)


def pairs(f, weights):
    """(9) without the sum over made-up items inside the logistic: each of them tells as much."""
    return (weights / weights.mean() * F.softplus(f[:, 1:] - f[:, :1]).mean(1)).mean()


corrector.LOSSES |= {"hard": hard, "pairs": pairs}


class Trial(train.Run):
    """A run that saves nothing: stopped, it starts anew."""

    def save(self, stem="checkpoint"):
        return False


class Average(Trial):
    """Measures the last round, and the means of the adapters that several rounds ended with."""

    def game(self, E_pre):
        T, ends = self.cfg.rounds, []
        for t in range(1, T + 1):
            self.round(t, E_pre)
            ends.append(self.policies.tuned.adapter_state("player"))
        for first, last in dict.fromkeys(((T, T), (1, T), (max(1, T - 1), T))):
            mean = [sum(p) / len(p) for p in zip(*ends[first - 1:last])]
            self.policies.tuned.load_adapter("player", mean)
            for split in ("val", "test"):
                row = self.measure("player", split, stage=f"mean {first}-{last}")
                print(f"{row['stage']} {split}, less SFT:", *(
                    f"{m} {x[0]:+.4f} [{x[1]:+.4f}, {x[2]:+.4f}]"
                    for m, x in row["less_sft"].items() if not m.startswith("DGU")))


def personal(A, shown, lists):
    """How far each user's list is from the user's own history, (N,): the total variation between
    their shares of groups (after Steck's calibration, 2018). MGU sees only the sums of all users.
    """
    own, its = (sums / count[:, None] for sums, count in (metrics.group_sums(A, x)
                                                          for x in (lists, shown)))
    return np.abs(own - its).sum(1) / 2


def parity(user):
    """0 for the cases of every other user, 1 for those of the users between."""
    return np.unique(user, return_inverse=True)[1] % 2


class Unseen(Trial):
    """The controller, and the bias of re-ranking, see the validation lists of every other user;
    fairness on test is told of these users and of the others, and how far the lists of either are
    from each user's own history.
    """

    def half(self, row, odd):
        """-> users, histories shown, lists and targets of the even or the odd users."""
        user, history, target = self.cases[row["split"]]
        at = np.flatnonzero(parity(user) == odd)
        shown = self.shown(history)
        return user[at], [shown[n] for n in at], np.array(row["lists"])[at], target[at]

    def seen(self, row):
        """A row with the exposures of the even users alone."""
        _, shown, lists, _ = self.half(row, False)
        E_star, E = (metrics.exposure(*metrics.group_sums(self.ds.credit, x))
                     for x in (shown, lists))
        return row | {"E_star": judger.TARGETS[self.cfg.target](E_star).tolist(), "E": E.tolist()}

    def judge(self, t, E_pre):
        key = train.key_of(f"ufo-{t - 1}" if t > 1 else "sft", "val")
        whole = self.state["measured"][key]
        self.state["measured"][key] = self.seen(whole)
        try:
            return super().judge(t, E_pre)
        finally:
            self.state["measured"][key] = whole

    def tell(self, name, row, **others):
        """Print what the lists of a row are worth to either half, less each of `others`' lists."""
        k, fair = f"MGU@{self.cfg.topk}", judger.TARGETS[self.cfg.target]
        for who, odd in (("seen", False), ("unseen", True)):
            user, shown, lists, target = self.half(row, odd)
            of = metrics.report(self.ds.credit, user, shown, lists, target,
                                np.zeros(len(user)), fair)
            gap = personal(self.ds.credit, shown, lists)
            print(f"{name:>8} {who:>6}: {k} {of[k]:.4f} (floor {of['MGU_floor']:.4f}), from each "
                  f"user's own history {gap.mean():.4f}")
            w = metrics.bootstrap_weights(user, 1000, np.random.default_rng(0))
            for other, its in others.items():
                its = self.half(its, odd)[2]
                less = metrics.difference(self.ds.credit, user, shown, lists, its, target,
                                          fair)
                d = gap - personal(self.ds.credit, shown, its)
                less["own history"] = d.mean(), *metrics.interval(w @ d / w.sum(1))
                print(f"{'less ' + other:>15}: " + ", ".join(
                    f"{m} {x[0]:+.4f} [{x[1]:+.4f}, {x[2]:+.4f}]" for m, x in less.items()),
                    flush=True)

    def reranked(self):
        """SFT's test lists under a bias fitted on the even users' validation lists."""
        for split in ("val", "test"):
            scores, seen = self.all_scores("sft", split)
            scores = np.where(seen, -np.inf, scores)
            if split == "val":
                E_star = np.array(self.seen(self.measure("sft", "val"))["E_star"])
                bias = judger.fit_bias(scores[parity(self.cases["val"][0]) == 0], self.ds.credit,
                                       E_star, self.cfg.topk)
        return {"split": "test",
                "lists": judger.top(scores + self.ds.credit @ bias, self.cfg.topk)}

    def game(self, E_pre):
        sft, biased = self.measure("sft", "test"), self.reranked()
        self.tell("SFT", sft)
        self.tell("rerank", biased, SFT=sft)
        for t in range(1, self.cfg.rounds + 1):
            self.round(t, E_pre)
            self.tell(f"ufo-{t}", self.measure("player", "test", stage=f"ufo-{t}"), SFT=sft,
                      rerank=biased)


def versus(*argv):
    """Print what model.pt of the first finished run measures less what the others' do, by the
    first's groups (or --group_by) and without the bias of re-ranking.
    """
    options = parse([str(a) for a in argv if str(a).startswith("--")], Config)
    folders = [a for a in argv if not str(a).startswith("--")]
    if len(folders) < 2:
        raise data.InputError("versus: name the folders of two finished runs, or more")
    if set(options) - {"group_by"}:
        raise data.InputError("versus: its one option is --group_by")
    runs = [train.trained(folder, **options) for folder in folders]
    for key in ("seed", "holdout", "eval_users", "topk"):
        if len({getattr(run.cfg, key) for run in runs}) > 1:
            raise data.InputError(f"versus: these runs have not the same --{key}")
    if any(run.made_of() != runs[0].made_of() for run in runs):
        raise data.InputError("versus: these runs are not of the same data and base")
    for run in runs:                    # no folder was opened: nothing to save, nowhere to log
        run.breathe, run.log = lambda: None, lambda **line: None
    for split in ("val", "test"):
        first, *others = (run.measure("player", split) for run in runs)
        for folder, row in zip(folders[1:], others):
            print(f"{split}, less {folder}:", *(f"{m} {x[0]:+.4f} [{x[1]:+.4f}, {x[2]:+.4f}]"
                                                for m, x in runs[0].difference(first, row).items()))


TRIALS = {"average": Average, "unseen": Unseen}


def main(trial="", *argv):
    if trial == "versus":
        return versus(*argv)
    if trial not in TRIALS:
        raise data.InputError(f"{trial!r}: the trials are versus, {' and '.join(TRIALS)}")
    cfg = configure(argv)
    if cfg.resume or not cfg.sft_from:
        raise data.InputError("a trial begins from a run's SFT: give --sft_from=DIR, no --resume")
    run = TRIALS[trial](cfg)
    with run.working():
        for split in ("val", "test"):
            run.measure("sft", split)
        run.game(np.array(run.measure("pretrained", "val")["E"]))


if __name__ == "__main__":
    sys.exit(exit_code(main, *sys.argv[1:]))
