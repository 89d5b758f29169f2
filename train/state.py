"""The state of a run: everything that a training step reads and writes, except its batch."""

from functools import reduce
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from model import weights
from model.weights import Params

Roles = dict[str, Params]


@flax.struct.dataclass
class TrainState:
    """The state of a run. `params` holds the trained half of each role's parameters, and `frozen` holds the frozen
    half, both as {role: tree}. Each half has None in place of the parameters in the other half.

    Only `params` is differentiated, has optimizer state and is checkpointed; `frozen` is rebuilt from the config. A
    role that does not train is only in `frozen`. The method `role` combines both halves. A role may share the frozen
    half of another role. Every random number of step n comes from fold_in(seed, n).
    """

    step: Array  # int32
    params: Roles
    frozen: Roles
    opt_state: optax.OptState
    seed: Array  # uint32
    bad: Array  # int32: consecutive non-finite steps, all skipped
    skipped: Array  # int32: total number of non-finite steps
    # Pairs (role, other role): the role uses the frozen half of the other role.
    shares: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())

    if TYPE_CHECKING:  # flax.struct adds this method

        def replace(self, **changes: object) -> "TrainState": ...

    @classmethod
    def create(
        cls,
        params: Roles,
        frozen: Roles,
        tx: optax.GradientTransformation,
        seed: int,
        shares: tuple[tuple[str, str], ...] = (),
    ) -> "TrainState":
        step, bad, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # separate buffers, since each is donated
        return cls(step, params, frozen, tx.init(params), jnp.uint32(seed), bad, skipped, shares)

    @property
    def key(self) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), self.step)

    @property
    def roles(self) -> Roles:
        """{role: the role's whole parameter tree}."""
        return {name: self.role(name) for name in self.params | self.frozen}

    def in_training(self, key: Array) -> Roles:
        """Returns {role: parameter tree} for a training step, with dropout and other noise in the roles that train."""
        roles = self.roles
        return roles | {name: weights.in_training(roles[name], key, self.step) for name in self.params}

    def role(self, name: str) -> Params:
        """Returns the whole parameter tree of a role: its trained half combined with its own frozen half or, if the
        role shares the frozen half of another role, with that one."""
        parts = [tree[name] for tree in (self.params, self.frozen) if name in tree]
        if shared := dict(self.shares).get(name):
            own = jax.tree.map(lambda _: None, parts[0])  # None for the head, which the other role lacks
            parts.append(own | self.frozen[shared])
        return reduce(weights.combine, parts)
