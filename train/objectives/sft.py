"""Next-token prediction on the targets that the mask keeps: pretraining, and supervised fine-tuning."""

from typing import Any

from jax import Array

from model.net import head
from train.objectives import Objective

BATCH = "lm"


def make(model: Any) -> Objective:
    """Mean negative log-likelihood per target token, in nats."""

    def loss(params: Any, batch: dict, key: Array) -> dict:
        policy = params["policy"]
        x = model.hidden(policy, batch["tokens"], batch["positions"], batch["segments"]).x
        nll = head.nll(model, policy, x, batch["targets"], batch["mask"])
        return {"loss": (nll, batch["mask"].sum())}

    return Objective(loss, BATCH, nll=True)
