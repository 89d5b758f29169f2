"""Next-token prediction on the targets where the mask is 1, for pretraining and supervised fine-tuning."""

from jax import Array

from data.rows.batch import Batch
from model.net import head
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Roles

BATCH = "lm"


def make(model: Transformer) -> Objective:
    """The loss is the mean negative log-likelihood per target token, in nats."""

    def loss(params: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        policy = params["policy"]
        x = model.hidden(policy, batch["tokens"], batch["positions"], batch["segments"]).x
        nll = head.nll(model, policy, x, batch["targets"], batch["mask"])
        return {"loss": (nll, batch["mask"].sum())}

    return Objective(loss, BATCH, nll=True)
