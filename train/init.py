"""From a config to a model and its first state: abstract values first, then arrays that are born sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from common.errors import UserError
from model import build, weights
from model.net import backends
from model.net.transformer import Transformer
from model.weights import Params
from train import mesh as meshes
from train.objectives import Objective
from train.optim import optimizer
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will hold, before any of it exists: abstract values and shardings of the whole train state."""

    model: Transformer
    objective: Objective
    transform: Callable[[Params, jax.Array], Params]
    tx: Any
    mask: Any  # {role: tree of bools}: what trains
    abstract: TrainState  # ShapeDtypeStructs
    shardings: TrainState
    mesh: Any
    attention: str  # which backend and why; "" without devices

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.mask)


def plan(cfg: Any, model: Transformer, mesh: Any) -> Plan:
    """Everything about the first state that does not need an array."""
    attention = ""
    if isinstance(mesh, Mesh):
        asked, devices = cfg.model.attention, mesh.devices.flat[0].platform
        found = backends.choose(asked, model.config, model.dtype, cfg.data.seq_len, devices, mesh.shape["context"])
        model, attention = dataclasses.replace(model, attention=found[0]), ", ".join(found)
    objective = build.find("train.objectives", cfg.objective)(model)
    transform = build.transform(cfg, model.specs)
    try:
        policy = jax.eval_shape(lambda base: transform(base, jax.random.key(0)), model.abstract)
        what = "adapters" if cfg.peft.name and cfg.trainable == "all" else cfg.trainable
        mask = {"policy": weights.trainable(policy, what)}
    except ValueError as e:
        raise UserError(str(e), "config", "see the parameter table of --plan") from e
    params = {"policy": policy}
    fresh = what == "adapters" and cfg.peft.name != "saved"  # then adapters off is the policy as it starts
    if "initial" in objective.roles.values() and not fresh:
        role = next(r for r, kind in objective.roles.items() if kind == "initial")
        params[role], mask[role] = policy, jax.tree.map(lambda _: False, mask["policy"])
    specs = dict.fromkeys(params, model.specs)
    axes = {role: weights.axes(tree, model.specs) for role, tree in params.items()}
    places = meshes.shardings(axes, params, mesh)
    train, _ = weights.partition(params, mask)
    tx = optimizer(cfg.optim, cfg.steps, train, specs)

    def create(params: Params) -> TrainState:
        return TrainState.create(*weights.partition(params, mask), tx, cfg.seed)

    abstract = jax.eval_shape(create, params)
    shardings = meshes.replicated(abstract, mesh)
    train_places, frozen_places = weights.partition(places, mask)
    opt_places = _like_params(abstract.opt_state, abstract.params, train_places, shardings.opt_state)
    shardings = shardings.replace(params=train_places, frozen=frozen_places, opt_state=opt_places)
    return Plan(model, objective, transform, tx, mask, abstract, shardings, mesh, attention)


def _like_params(opt_state: Any, params: Any, places: Any, default: Any) -> Any:
    """Optimizer arrays that repeat a parameter (same path ending, same shape) lie where it lies."""
    where = {}
    weights.map_named(lambda path, x, s: where.setdefault(path, (x.shape, s)), params, places)

    def place(path: str, x: Any, other: Any) -> Any:
        parts = path.split("/")
        for i in range(len(parts)):
            shape, sharding = where.get("/".join(parts[i:]), (None, None))
            if shape == x.shape:
                return sharding
        return other

    return weights.map_named(place, opt_state, default)


def first_state(cfg: Any, plan: Plan, pretrained: Any | None) -> TrainState:
    """Step 0: weights at random, or streamed from a checkpoint leaf by leaf, then transformed; born sharded."""
    model, key = plan.model, jax.random.key(cfg.seed)
    base_places = meshes.shardings(weights.axes(model.abstract, model.specs), model.abstract, plan.mesh)
    if pretrained is None:
        base = jax.jit(model.init, out_shardings=base_places)(key)
    else:
        base = pretrained.load(model.specs, base_places, model.param_dtype)

    def create(base: Params, key: jax.Array) -> TrainState:
        policy = plan.transform(base, key)
        params = dict.fromkeys(plan.roles, policy)
        return TrainState.create(*weights.partition(params, plan.mask), plan.tx, cfg.seed)

    return jax.jit(create, out_shardings=plan.shardings, donate_argnums=0)(base, key)
