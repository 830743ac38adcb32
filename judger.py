"""The judger: where does the unfairness come from (5), whose sample is this (6), which groups are
starved (7), (8). And re-ranking, the baseline that needs no training.

Pure functions. NumPy for what is measured once a round, torch for what stands inside the loss. G
groups, N cases, B rows.
"""

import numpy as np

import metrics

# ---------------------------------------------------------------- where it comes from: equation (5)

def origins(E_star, E_pre, E_sft):
    """(5): split SFT's unfairness into what pretraining brought and what SFT did. All (G,).

    Returns b = E_pre - E_star, shift = E_sft - E_pre (b + shift = GU_sft), their covariance over
    groups (mean of products of deviations) and their correlation. covariance > 0: SFT amplifies the
    pretraining bias; < 0: it works against it. E_pre is in both with opposite signs, so noise in it
    pushes this plain covariance down: see `covariance_debiased`.
    """
    b, shift = E_pre - E_star, E_sft - E_pre
    c = covariance(b, shift)
    spread = np.sqrt(covariance(b, b) * covariance(shift, shift))
    return {"b": b, "shift": shift, "covariance": float(c),
            "correlation": float(c / spread) if spread > 0 else 0.0}


def covariance(x, y):
    """Covariance over the last axis, the groups (divided by G)."""
    return ((x - x.mean(-1, keepdims=True)) * (y - y.mean(-1, keepdims=True))).mean(-1)


def covariance_debiased(star, pre, sft, users, fair=lambda E: E, n_split=1000, seed=0):
    """(5) without the bias of its own noise: b from one half of the users, shift from the other,
    both ways round.

    star, pre, sft: (sums (N, G), counts (N,)) as `metrics.group_sums` gives for the histories
    shown, the pretrained and the fine-tuned lists; users (N,); fair: histories' exposure -> E* (see
    TARGETS). The halves share no user, so no noise stands in both factors and the product is
    unbiased. Averaged over n_split random halvings; the 95 % interval is of halvings whose halves
    are each resampled by user, which is somewhat too wide (one halving is noisier than their
    average). Returns (covariance, [low, high]).
    """
    rng, ids = np.random.default_rng(seed), np.unique(users)
    if len(ids) < 4:
        return float("nan"), [float("nan")] * 2
    index = np.searchsorted(ids, users)
    half = np.argsort(rng.random((n_split, len(ids))), axis=1) < len(ids) // 2     # (R, U)

    def estimate(first, second):
        """Weights of the users in either half (R, U) -> covariances (R,)."""
        parts = []
        for w in (first[:, index], second[:, index]):
            e_star, e_pre, e_sft = (metrics.exposure(*x, w) for x in (star, pre, sft))
            parts.append((e_pre - fair(e_star), e_sft - e_pre))
        (b1, s1), (b2, s2) = parts
        return (covariance(b1, s2) + covariance(b2, s1)) / 2

    def resample(half):
        return np.array([rng.multinomial(h.sum(), h / h.sum()) for h in half.astype(float)], float)
    point = estimate(half.astype(float), (~half).astype(float)).mean()
    return float(point), metrics.interval(estimate(resample(half), resample(~half)))


# ---------------------------------------------------------------------- whose sample: equation (6)

def score(logq, logq_t, logq_sft, lam, alpha):
    """(6) f(x, y) = lam [log q_theta - alpha log q_t - (1 - alpha) log q_sft], up to a constant of
    x. Same shapes in and out.

    The judger that best tells a user's next item from one the opponent made up, in closed form: it
    needs no network of its own. lam > 0 is the strength of the anchor, alpha, 0 to 1, how much of
    the anchor is the opponent (the rest is the SFT model: Alami et al.'s geometric mixture).
    """
    return lam * (logq - alpha * logq_t - (1 - alpha) * logq_sft)


def accuracy(f):
    """f (B, 1 + S), the true item first -> share of (true, made-up) pairs that the judger gets
    right, ties half.

    1/2 is the game's equilibrium: nobody can tell the two apart.
    """
    true, fake = f[:, :1], f[:, 1:]
    return float(((true > fake).float() + 0.5 * (true == fake).float()).mean())


# ---------------------------------------------------- the verdict on the groups: equations (7), (8)

def control(log_v, E_star, E_t, gamma, eps=1e-3, limit=np.log(10)):
    """(7) one turn of the controller: groups that the lists starve get more weight. All (G,);
    returns the new log v.

    gamma >= 0 is the gain, eps keeps a group that is never shown finite, log v stays within
    +-limit.
    """
    return np.clip(log_v + gamma * np.log((E_star + eps) / (E_t + eps)), -limit, limit)


def verdict_parts(E_star, E_pre, E_t, eps=1e-3):
    """The two parts of (7)'s error, for the log: (log E*/E_pre, log E_pre/E_t): pretraining's and
    fine-tuning's. (G,).
    """
    return np.log((E_star + eps) / (E_pre + eps)), np.log((E_pre + eps) / (E_t + eps))


def item_weights(A, log_v):
    """(8) before it is divided by the batch's mean: w(i) = exp(sum_g A[i, g] log v(g)). A (I, G) ->
    (I,) > 0.
    """
    return np.exp(A @ log_v)


# --target=NAME: the exposure (..., G) that a fair policy would have, from the histories' (..., G):
# what (4) measures against and (7) steers to. Add a function and its name
TARGETS = {"history": lambda E_star: E_star,
           "equal": lambda E_star: np.full_like(E_star, 1 / E_star.shape[-1])}


# ------------------------------------------------- re-ranking, the baseline that needs no training

def top(scores, k):
    """The k < I best of every row of scores (N, I), best first -> (N, k); -1 where it is -inf."""
    best = np.argpartition(-scores, k, axis=1)[:, :k]           # quicker than sorting them all
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
    lists = np.take_along_axis(best, order, 1)
    lists[np.isinf(np.take_along_axis(scores, lists, 1))] = -1
    return lists


def fit_bias(scores, A, E_star, k, turns=60, gain=0.3):
    """A bias beta(g) for every group, such that the top k of scores (N, I) + A beta are exposed as
    E_star wants. The controller (7) again, turned on fixed scores until it stands, within the same
    limits; of its turns, the one with the least MGU. Scores of what a user has seen are -inf.
    -> beta (G,).
    """
    beta = best = np.zeros(A.shape[1])
    least = np.inf
    for _ in range(turns):
        lists = top(scores + A @ beta, k)
        E = metrics.exposure(*metrics.group_sums(A, lists))
        if (unfair := metrics.mgu(E - E_star)) < least:
            least, best = unfair, beta
        beta = control(beta, E_star, E, gain)
    return best
