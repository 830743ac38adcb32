"""The corrector: the loss that retrains the player, equation (9). Pure: scores and weights in, a
number out.
"""

import torch
import torch.nn.functional as F


def loss(f, weights):
    """(9)  mean over rows of  w(y) * softplus( logsumexp_s( f(y'_s) - f(y) ) ),  f of
    `judger.score`.

    f (B, 1 + S) float32: column 0 is the user's true next item y, the other S are the items y'_s
    that the opponent made up for the same history. weights (B,) >= 0: w(y) of (8); they are divided
    by their mean here, so a batch always weighs the same and a weight acts on its own sample.

    S = 1, w = 1, alpha = 1 is SPIN's logistic loss; S > 1 puts the negatives into one logistic loss
    as S-DPO does. At f = 0 (the start of a round with alpha = 1, where the player is its anchor)
    the loss is log(1 + S). ValueError on shapes that do not fit, so that no weight is ever
    broadcast over the wrong axis.
    """
    if f.dim() != 2 or f.shape[1] < 2 or weights.shape != f.shape[:1]:
        raise ValueError(f"scores {tuple(f.shape)} and weights {tuple(weights.shape)}: expected "
                         f"(B, 1 + S) and (B,)")
    margin = torch.logsumexp(f[:, 1:] - f[:, :1], dim=1)               # (B,)
    return (weights / weights.mean() * F.softplus(margin)).mean()


def sft(f, weights):
    """Weighted fine-tuning, no game: f(y) is lam * log q(y) less what does not train, so -f(y) has
    lam times the gradient of the log-loss. With the weights of (8) this is reweighted SFT
    (IFairLRS), each weight on its own sample.
    """
    return -(weights / weights.mean() * f[:, 0]).mean()


# --loss=NAME; add a function of (f, weights) and its name. "both" is SPRec's: the game and SFT
LOSSES = {"logistic": loss, "sft": sft, "both": lambda f, w: loss(f, w) + sft(f, w)}
