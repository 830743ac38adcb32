"""What is measured: exposure and unfairness (2)-(4), accuracy, diversity, and how sure we are.

Pure functions on NumPy arrays. A (I, G): item i's credit to group g. N prediction cases (a user may
have several), K places in a list, I items, G groups, W bootstrap weightings. A list of items
shorter than the others is padded with -1.
"""

import numpy as np


def group_sums(A, items):
    """Credit of the items of each case: A (I, G), items N arrays -> sums (N, G), counts (N,). -1 is
    no item.
    """
    kept = [np.asarray(x)[np.asarray(x) >= 0] for x in items]
    return np.array([A[x].sum(0) for x in kept]), np.array([len(x) for x in kept], float)


def exposure(sums, counts, weights=None):
    """(2), (3): mean credit of every item shown. sums (N, G), counts (N,) -> (G,); with weights (W,
    N) -> (W, G).
    """
    w = np.ones((1, len(counts))) if weights is None else weights
    e = (w @ sums) / (w @ counts)[:, None]
    return e[0] if weights is None else e


def mgu(gu):
    """(4) mean group unfairness, mean_g |GU(g)|. gu (..., G) -> (...)."""
    return np.abs(gu).mean(-1)


def dgu(gu):
    """(4) the gap between the most over- and the most under-exposed group. gu (..., G) -> (...)."""
    return gu.max(-1) - gu.min(-1)


def hits(lists, targets):
    """lists (N, K), targets (N,) -> (N,) 1 where the target is in the list: its mean is HR@K."""
    return (lists == np.asarray(targets)[:, None]).any(1).astype(float)


def ndcg(lists, targets):
    """(N,) 1 / log2(place + 1) of the one relevant item, places from 1, 0 if it is not in the list:
    mean is NDCG@K.
    """
    hit = lists == np.asarray(targets)[:, None]
    return np.where(hit.any(1), 1 / np.log2(hit.argmax(1) + 2), 0.0)


def coverage(lists, n_items):
    """Distinct items recommended over the size of the catalog."""
    return len(np.unique(lists[lists >= 0])) / n_items


def div_ratio(lists):
    """Distinct items recommended over all places (SPRec)."""
    shown = lists[lists >= 0]
    return len(np.unique(shown)) / len(shown)


def or_ratio(lists, top=3):
    """Over-recommendation: the share of all places that the `top` most recommended items take
    (SPRec).
    """
    count = np.sort(np.bincount(lists[lists >= 0]))[::-1]
    return count[:top].sum() / count.sum()


def bootstrap_weights(users, n, rng):
    """Resample users with replacement: users (N,) -> weights (n, N), how often each case's user was
    drawn.
    """
    ids, index = np.unique(users, return_inverse=True)
    drawn = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=n)
    return drawn[:, index].astype(float)


def interval(samples):
    """95 % percentile interval, [low, high]."""
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def figures(A, users, histories, lists, targets, fair=lambda E: E, n_boot=1000):
    """-> {metric: (figure, its W = n_boot bootstrap samples)}, E_star (G,), E (G,), GU of the
    samples (W, G), and their weights (W, N).

    A (I, G); users (N,); histories: N arrays, the items shown to the policy; lists (N, K); targets
    (N,); fair: histories' exposure -> E*, the identity unless --target says otherwise. The samples
    are over users, always the same draws, so that two policies' figures are resampled alike.
    Resampling adds its own noise, which pushes a |.| up: the samples of MGU and DGU are shifted to
    have the figure as their mean.
    """
    k, w = np.shape(lists)[1], bootstrap_weights(users, n_boot, np.random.default_rng(0))
    shown, listed, found = group_sums(A, histories), group_sums(A, lists), {}
    star, e = fair(exposure(*shown)), exposure(*listed)
    gu_w = exposure(*listed, w) - fair(exposure(*shown, w))
    for name, f in ((f"HR@{k}", hits), (f"NDCG@{k}", ndcg)):
        x = f(np.asarray(lists), targets)
        found[name] = x.mean(), w @ x / w.sum(1)
    for name, f in ((f"MGU@{k}", mgu), (f"DGU@{k}", dgu)):
        found[name] = f(e - star), f(gu_w) - f(gu_w).mean() + f(e - star)
    return found, star, e, gu_w, w


def report(A, users, histories, lists, targets, log_loss, fair=lambda E: E, n_boot=1000):
    """Everything that is said of one policy on one split.

    The arguments of `figures`, and log_loss (N,) nats, -log q of the target. Returns a dict: the
    figures by their names with K in them, `ci` (95 % intervals; those of MGU and DGU are centred on
    the figure, which itself contains the noise, so compare MGU with the floor and not with 0),
    `MGU_floor` (the MGU to expect if the true GU were zero: the mean MGU of the bootstrap's
    deviations), E_star and E (G,).
    """
    found, star, e, gu_w, w = figures(A, users, histories, lists, targets, fair, n_boot)
    found["log_loss"] = log_loss.mean(), w @ log_loss / w.sum(1)
    ci = {name: [max(0.0, x) for x in interval(samples)] for name, (_, samples) in found.items()}
    return {name: float(x) for name, (x, _) in found.items()} | {
        "MGU_floor": float(mgu(gu_w - (e - star)).mean()), "coverage": coverage(lists, len(A)),
        "div_ratio": div_ratio(lists), "or_ratio": or_ratio(lists), "ci": ci,
        "E_star": star.tolist(), "E": e.tolist()}


def difference(A, users, histories, a, b, targets, fair=lambda E: E):
    """Policy a less policy b on the same cases, both resampled alike: lists a, b (N, K), the rest
    as in `figures` -> {metric: [difference, low, high]}, 95 %.
    """
    (a, *_), (b, *_) = (figures(A, users, histories, x, targets, fair) for x in (a, b))
    return {m: [float(a[m][0] - b[m][0]), *interval(a[m][1] - b[m][1])] for m in a}
