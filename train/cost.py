"""Computes the cost of a run (parameters, FLOPs, bytes) before its first step, from einsum equations and array
shapes."""

import math
from typing import NamedTuple

import jax
from jax import Array

from common.chips import Chip
from model import weights
from model.config import ModelConfig, in_layers
from model.net.kinds import KINDS
from model.net.transformer import virtual_tokens
from model.weights import Params, Spec, Specs, Tree, Weight
from train.init import Blueprint


class Cost(NamedTuple):
    """Parameter counts and FLOPs of a model. Layer FLOPs are per token. Head FLOPs are per target, that is, per token
    that counts in the loss."""

    params: float
    trained: float
    layer_flops: float  # forward, per token
    layer_train_flops: float  # forward and backward, per token
    head_flops: float
    head_train_flops: float

    def step(self, tokens: int, targets: int) -> float:
        """The FLOPs of one training step. Recomputation due to remat is not counted, as is usual for model FLOPs
        utilization (MFU)."""
        return tokens * self.layer_train_flops + targets * self.head_train_flops

    def forward(self) -> "Cost":
        """The cost of the same model if it only runs forward passes and does not train."""
        return self._replace(trained=0, layer_train_flops=self.layer_flops, head_train_flops=self.head_flops)


def cost(config: ModelConfig, params: Params, specs: Specs, mask: Tree, seq_len: int) -> Cost:
    """Computes the cost of a model from the einsum equations of its weights. A multiply-add counts as 2 FLOPs in the
    forward pass, 2 for the gradient with respect to the input and, if the weight trains, 2 for the gradient with
    respect to the weight. Attention is counted as if each row were filled by a single document, which gives (T + 1) / 2
    keys per query in a causal model. Attention to virtual tokens is included.

    Only matrix products are counted, not lookups, norms, activations, or the recurrence and convolution of recurrent
    layers. Work that is done once per step instead of once per token is not counted either: the norms of DoRA, the
    inverses of OFT, and the forward pass of a trained prompt. With LoRA, training a model of N parameters costs 4 N
    FLOPs per token instead of 6 N (Schulman et al. 2025, LoRA Without Regret).
    """
    c = config
    totals = dict(layer=0.0, layer_dw=0.0, head=0.0, head_dw=0.0)
    head_path = "embed/table" if c.tied else "unembed/table"

    def count(path: str, w: Array | Weight, spec: Spec | None, m: Tree) -> None:
        if (spec and not spec.eqn) or (path.startswith("embed") and not c.tied):
            return
        part = "head" if path == head_path else "layer"
        stacked = spec.stacked if spec else in_layers(path)
        macs = w.macs(stacked) if isinstance(w, Weight) else w.size
        for n, moves in zip(jax.tree.leaves(macs), jax.tree.leaves(m), strict=True):
            totals[part] += 2 * n
            totals[part + "_dw"] += 2 * n * moves

    masks = iter(jax.tree.leaves(mask, is_leaf=weights.is_weight))
    weights.replace(params, specs, lambda path, w, spec: count(path, w, spec, next(masks)))
    virtual = virtual_tokens(params)
    attention = 4 * c.heads * c.head_dim * sum(KINDS[kind].keys_per_query(c, seq_len, virtual) for kind in c.kinds)
    pairs = zip(weights.arrays(params), weights.arrays(mask), strict=True)
    sizes = [(x.size, any(jax.tree.leaves(m))) for x, m in pairs]
    return Cost(
        params=sum(n for n, _ in sizes),
        trained=sum(n for n, m in sizes if m),
        layer_flops=totals["layer"] + attention,
        layer_train_flops=2 * totals["layer"] + totals["layer_dw"] + 3 * attention,
        head_flops=totals["head"],
        head_train_flops=2 * totals["head"] + totals["head_dw"],
    )


def of_roles(plan: Blueprint, seq_len: int) -> dict[str, Cost]:
    """Returns {role: cost} for all roles of a run. If a new adapter trains, the reference role has no parameter tree of
    its own, because the reference model is the policy's base model."""
    found = {}
    for name, role in plan.objective.roles.items():
        network = plan.network(name)
        if name in plan.mask:
            tree, mask = plan.abstract.role(name), plan.mask[name]
        else:
            tree = weights.base(plan.abstract.role("policy"))
            mask = jax.tree.map(lambda _: False, tree)
        price = cost(network.config, tree, network.specs, mask, seq_len)
        if role.head or not plan.objective.logits:  # the cost of a head that replaces the unembedding is negligible
            price = price._replace(head_flops=0.0, head_train_flops=0.0)
        found[name] = price if role.kind == "train" else price.forward()
    return found


def of_plan(plan: Blueprint, seq_len: int) -> Cost:
    """Returns the cost per token, summed over all roles of a run, because each batch passes once through the network of
    each role."""
    return Cost(*map(sum, zip(*of_roles(plan, seq_len).values(), strict=True)))


def bytes_per_device(tree: Tree, shardings: Tree) -> int:
    """Returns the bytes that a tree of (abstract) arrays takes on each device. If the shards of an array differ in
    size, the largest shard is counted."""
    one = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(one, tree, shardings)))


def mfu(flops_per_second: float, chip: Chip | None, devices: int) -> float | None:
    """Model FLOPs utilization: `flops_per_second` as a fraction of the bf16 peak of all devices. Returns None for an
    unknown chip."""
    return flops_per_second / (chip.tflops.value * 1e12 * devices / chip.devices) if chip else None
