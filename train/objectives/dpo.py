"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) and variants of its loss."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Role, Roles
from train.objectives._preference import both, divergence, figures, has_pair, lengths, logps, reference, summed

BATCH = "pair"


def make(
    model: Transformer,
    *,
    beta: float = 0.1,
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    sft_weight: float = 0.0,
) -> Objective:
    """The loss is a function of h, averaged over pairs. h is the log-ratio log(pi / pi_ref) of the chosen answer minus
    the log-ratio of the rejected answer.

    `sigmoid`: -log sigmoid(beta h), eq. 7; `label_smoothing` is cDPO's eps, the assumed fraction of flipped labels.
    `hinge`: relu(1 - beta h) (SLiC, Zhao et al. 2023, arXiv 2305.10425, eq. 8, but with log-ratios).
    `ipo`: (h - 1/(2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17), where the log-probabilities in h are means
    over tokens, as the authors confirmed to the developers of TRL.
    `robust`: the sigmoid loss, corrected for a fraction `label_smoothing` of flipped labels (Chowdhury et al. 2024,
    arXiv 2403.00409, eq. 9).
    `length_normalized` divides each log-ratio by its answer's length, as `ipo` always does. `sft_weight` times the
    chosen answer's mean negative log-likelihood is added to the loss (RPO, Pang et al. 2024, arXiv 2404.19733, eq. 1).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing:g} is not in [0, 0.5)")

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        rows = both(batch)
        policy = logps(model, roles["policy"], rows)  # [2B]
        ratio = policy - logps(model, reference(roles), rows)  # log pi/pi_ref
        if length_normalized or loss == "ipo":
            ratio /= lengths(rows)
        chosen, rejected = jnp.split(ratio, 2)
        each = preference_loss(chosen - rejected, beta, loss, label_smoothing)
        if sft_weight:
            each += sft_weight * -jnp.split(policy, 2)[0] / lengths(batch["chosen"])
        values = {"loss": each} | figures(beta * chosen, beta * rejected, policy, batch)
        return summed(values, has_pair(batch))

    def heldout(roles: Roles, batch: Batch) -> dict[str, Pair]:
        return divergence(model, roles, both(batch))

    return Objective(compute, BATCH, {"policy": Role("train"), "ref": Role("initial")}, heldout=heldout)


def preference_loss(h: Array, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0) -> Array:
    """The loss of each pair [B], where `h` [B] is the log-ratio of the pair's chosen answer minus that of its rejected
    answer."""
    eps, right, wrong = label_smoothing, -jax.nn.log_sigmoid(beta * h), -jax.nn.log_sigmoid(-beta * h)
    if loss == "hinge":
        return jax.nn.relu(1 - beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "robust":
        return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
    return (1 - eps) * right + eps * wrong
