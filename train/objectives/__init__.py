"""Each file in this folder defines a training objective, by a function `make(model, **config) -> Objective`, whose
keyword arguments are the objective's config keys."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jax import Array

from model.net.transformer import Transformer
from train.source import Batches, Source

if TYPE_CHECKING:
    from train.init import Blueprint

Pair = tuple[Array, Array]  # (sum, weight)
Roles = dict[str, Any]  # {role: parameter tree}, the first argument of a loss


class Role(NamedTuple):
    """One of the parameter trees that a loss reads.

    `kind`: a role of kind "train" is trained as the config's `trainable`, `peft` and `quant` specify. A role of kind
    "initial" is a fixed copy of the policy before the first step. A role of kind "frozen" is another model, which does
    not change.
    `start` is an opened model (`infer.models.open_model`) whose weights the role starts from. If `start` is None, the
    role starts from the policy's initial weights. `model` is the role's network if it differs from the policy's
    network. `head` names a file in model/heads. The head that this file defines is stored under "head" in the role's
    tree, and replaces the unembedding. `shares` names another role whose frozen parameters this role uses instead of a
    copy. For example, a critic trained with LoRA then needs memory only for its adapters and its head, not for a second
    base model.
    """

    kind: Literal["train", "initial", "frozen"]
    start: Any = None
    model: Transformer | None = None
    head: str = ""
    shares: str = ""


class Objective(NamedTuple):
    """A training objective. `loss(roles, batch, key)` returns metrics as (sum, weight) pairs. Training minimizes the
    mean of metrics["loss"], which is its sum divided by its weight.

    The argument `roles` always contains "policy". If only new adapters train, it contains no role of kind "initial".
    The loss then uses `weights.base(policy)` instead, the policy without its adapters, which takes no extra memory.
    `batch` is the kind of batch that the loss reads (data.rows.batch.KINDS). An objective's file also defines this kind
    as the constant BATCH, which is needed to check a config. The last held-out batch may have rows without targets,
    which must not count in any metric.
    `nll`: whether `batch` is "lm" and the loss is the negative log-likelihood of its targets, in nats. If `nll` is
    True, the held-out loss is named "nll", and bits per byte are also measured.
    `logits`: whether the loss computes logits. If so, their FLOPs are counted.
    If the policy has a head in place of the unembedding, the objective's file defines the head's name as the constant
    HEAD, which is needed to open a finished run.
    `heldout(roles, batch)` returns additional metrics for held-out batches. Computing them at every training step would
    be too expensive. `check` gets the columns of the training data, {name: values}, and raises UserError if the
    objective cannot train on them.
    `source` is for on-policy objectives, whose data are only prompts. It is called with the data's batches and the
    run's blueprint, and returns the Source that samples the training batches from the policy.
    """

    loss: Callable[[Roles, dict, Array], dict[str, Pair]]
    batch: str
    roles: dict[str, Role] = {"policy": Role("train")}
    nll: bool = False
    logits: bool = True
    source: Callable[[Batches, "Blueprint"], Source] | None = None
    heldout: Callable[[Roles, dict], dict[str, Pair]] | None = None
    check: Callable[[Mapping[str, np.ndarray]], None] | None = None
