"""Odds-ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), which needs no reference model."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Roles
from train.objectives._preference import both, figures, has_pair, lengths, logps, summed

BATCH = "pair"


def make(model: Transformer, *, beta: float = 0.1) -> Objective:
    """The loss (eq. 6) is the chosen answer's negative log-likelihood plus `beta` (lambda in the paper) times -log
    sigmoid of the log odds ratio, averaged over pairs. Both terms use log-probabilities averaged over tokens (eq. 3 and
    4)."""

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        rows = both(batch)
        policy = logps(model, roles["policy"], rows)
        chosen, rejected = jnp.split(policy / lengths(rows), 2)
        odds = log_odds(chosen) - log_odds(rejected)
        values = {"loss": -chosen - beta * jax.nn.log_sigmoid(odds), "nll": -chosen, "log_odds_ratio": odds}
        return summed(values | figures(beta * chosen, beta * rejected, policy, batch), has_pair(batch))

    return Objective(compute, BATCH)


def log_odds(logp: Array) -> Array:
    """Computes log(p / (1 - p)) from log p. The result is finite even for an empty answer, which has p = 1."""
    return logp - jnp.log1p(-jnp.exp(jnp.minimum(logp, -1e-7)))
