"""Small configs, batches and meshes, and the losses of a few training steps."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from model import build
from train import init
from train.mesh import BATCH, RULES, make_mesh
from train.step import compile_step

B, T = 8, 32
CPU = jax.devices()


def config(**changes):
    c = base.get_config()
    c.steps = 20
    c.model.shape = "tiny"
    c.optim.lr, c.optim.warmup = 1e-2, 0.0
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def rows(seed=0, batch=B):
    """Rows whose masks keep very different numbers of targets."""
    r = np.random.default_rng(seed)
    tokens = r.integers(0, 500, (batch, T + 1)).astype(np.int32)
    mask = (np.arange(T) < r.integers(1, T, (batch, 1))).astype(np.float32)
    ones = np.ones((batch, T), np.int32)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=mask, segments=ones, positions=ones.cumsum(1) - 1)


def mesh_of(*shape):
    """data, fsdp, tensor, context."""
    sizes = dict(zip(("data", "fsdp", "tensor", "context"), shape))
    return make_mesh(sizes, CPU[: int(np.prod(shape))])


def losses(c, shape=(1, 1, 1), steps=20, batch=None):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        plan = init.blueprint(c, build.model(c, None, 500), mesh)
        state = init.first_state(c, plan, None)
        step = compile_step(plan, c.accum)
        batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*BATCH[: np.ndim(x)]))), batch or rows())
        out = []
        for _ in range(steps):
            state, m = step(state, batch)
            out.append(float(m["loss"][0] / m["loss"][1]))
    return np.array(out), state


class Random(NamedTuple):
    """An opened model with weights from a seed."""

    model: Any
    seed: int

    def load(self, specs, shardings=None, dtype="float32"):
        return jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(self.seed))
