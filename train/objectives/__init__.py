"""Training objectives. Each file exposes `make(model, **config) -> Objective`; the keyword arguments are its schema."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jax import Array

from model.net.transformer import Transformer
from train.source import Batches, Source

if TYPE_CHECKING:
    from train.init import Blueprint

Pair = tuple[Array, Array]  # (sum, weight)
Roles = dict[str, Any]  # {role: parameter tree}, as a loss gets them


class Role(NamedTuple):
    """One of the parameter trees that a loss reads.

    `kind`: "train" follows the config's `trainable`, `peft` and `quant`; "initial" is the policy as it was before the
    first step, held fixed; "frozen" is another model, held fixed.
    `start` is an opened model (`infer.models.open_model`) whose weights the role starts from; None: those of the run.
    `model` is the role's network if it differs from the policy's. `head` is a file of model/heads: its head is stored
    in the role's tree at "head" and used instead of logits.
    `shares` names a role whose frozen half this one uses instead of a copy: a critic under LoRA then costs only its
    adapters and its head, not a second base.
    """

    kind: Literal["train", "initial", "frozen"]
    start: Any = None
    model: Transformer | None = None
    head: str = ""
    shares: str = ""


class Objective(NamedTuple):
    """`loss(roles, batch, key)` returns metrics as (sum, weight) pairs; the mean of metrics["loss"] is minimized.

    `roles` always has "policy". If only fresh adapters train, the loss gets no "initial" role: it is
    `weights.base(policy)`, the base with its adapters off, and costs no memory.
    `batch` is the kind of batch that the loss reads (data.rows.batch.KINDS). An objective's file assigns it to its
    constant BATCH, which the config's rules read too. Rows without targets, which the last held-out batch may have,
    must count in no metric.
    `nll`: the loss is the negative log-likelihood of the targets of an lm batch, in nats. On held-out data it is called
    "nll", and bits per byte are added.
    `logits`: the loss reads the logits, so that their FLOPs count.
    An objective whose policy answers through a head assigns the head's name to the constant HEAD of its file, so that
    the run can be opened again.
    `heldout(roles, batch)` returns further metrics of held-out batches, which would cost too much at every step.
    `check` gets the columns of the training data, {name: values}, and raises UserError if they do not suffice.
    `source` makes the run's batches if the data are only prompts: an on-policy objective samples from the state. Its
    arguments are the data's batches and the run's blueprint.
    """

    loss: Callable[[Roles, dict, Array], dict[str, Pair]]
    batch: str
    roles: dict[str, Role] = {"policy": Role("train")}
    nll: bool = False
    logits: bool = True
    source: Callable[[Batches, "Blueprint"], Source] | None = None
    heldout: Callable[[Roles, dict], dict[str, Pair]] | None = None
    check: Callable[[Mapping[str, np.ndarray]], None] | None = None
