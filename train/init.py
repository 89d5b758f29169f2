"""Creates the first state of a run from its config. The state is first planned as shapes and shardings, and then
created as sharded arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from common.errors import UserError
from common.types import Config
from model import build, heads, weights
from model.net import backends
from model.net.transformer import Transformer, virtual_tokens
from model.peft import saved as saved_adapter
from model.weights import Params, Tree
from train import mesh as meshes
from train.objectives import Objective, Role
from train.optim import optimizer
from train.state import Roles, TrainState


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Describes a run before any array is created: shapes and shardings of the train state, and the objects that the
    run uses."""

    model: Transformer  # the network of the policy
    objective: Objective
    transform: Callable[[Params, Array], Params]  # adds adapters and quantization to the weights of a role that trains
    tx: optax.GradientTransformation
    mask: dict[str, Tree]  # {role: tree of bools}: which parameters train
    abstract: TrainState  # ShapeDtypeStructs
    shardings: TrainState
    mesh: Mesh | AbstractMesh
    attention: str  # the attention backend and why it was chosen; "" if planned without devices

    def network(self, role: str) -> Transformer:
        """Returns the network of a role: its own network if it has one, else the policy's."""
        return self.objective.roles[role].model or self.model


def blueprint(cfg: Config, model: Transformer, mesh: Mesh | AbstractMesh) -> Blueprint:
    """Plans the first state of a run without creating arrays. Raises UserError if the config does not fit the model."""
    attention = ""
    if isinstance(mesh, Mesh):
        asked, devices = cfg.model.attention, mesh.devices.flat[0].platform
        found = backends.choose(asked, model.config, model.dtype, cfg.data.seq_len, devices, mesh.shape["context"])
        model, attention = dataclasses.replace(model, attention=found[0]), ", ".join(found)
    objective = build.find("train.objectives", cfg.objective)(model)
    transform = build.transform(cfg, model.specs)
    what = "adapters" if cfg.peft.name and cfg.trainable == "all" else cfg.trainable
    fresh = what == "adapters" and cfg.peft.name != "saved"  # with a new adapter, the initial policy is the base model
    abstract, mask, specs, axes, shares = {}, {}, {}, {}, {}
    for name, role in objective.roles.items():
        if role.kind == "initial" and fresh:
            continue
        network = role.model or model
        abstract[name] = _abstract(network, role, transform)
        mask[name] = _mask(abstract[name], role, what)
        specs[name] = network.specs
        axes[name] = weights.axes(abstract[name], network.specs)
        if other := role.shares or ("policy" if role.kind == "initial" else ""):
            shares[name] = other
    _check_positions(cfg, model, abstract.get("policy", {}))
    places = meshes.shardings(axes, abstract, mesh)
    train, _ = _halves(objective.roles, abstract, mask, shares)
    tx = optimizer(cfg.optim, cfg.steps, train, specs)

    def create(roles: Roles) -> TrainState:
        return TrainState.create(*_halves(objective.roles, roles, mask, shares), tx, cfg.seed, tuple(shares.items()))

    state = jax.eval_shape(create, abstract)
    train_places, frozen_places = _halves(objective.roles, places, mask, shares)
    shardings = meshes.replicated(state, mesh)
    opt_places = _like_params(state.opt_state, state.params, train_places, shardings.opt_state)
    shardings = shardings.replace(params=train_places, frozen=frozen_places, opt_state=opt_places)
    return Blueprint(model, objective, transform, tx, mask, state, shardings, mesh, attention)


def _check_positions(cfg: Config, model: Transformer, policy: Params) -> None:
    """Raises UserError for rows longer than the model's context."""
    room = model.config.context - virtual_tokens(policy)
    if cfg.data.seq_len > room:
        what = f"rows of {cfg.data.seq_len} tokens exceed the model's context of {room}"
        raise UserError(what, "config.data.seq_len", f"at most {room}")


def _abstract(network: Transformer, role: Role, transform: Callable[[Params, Array], Params]) -> Params:
    """Returns the parameter tree of a role as ShapeDtypeStructs. Raises UserError if the config's adapters or
    quantization do not fit the network."""
    try:
        return jax.eval_shape(lambda base: _grown(network, role, transform, base, jax.random.key(0)), network.abstract)
    except ValueError as e:
        raise UserError(str(e), "config", "see the parameter table of --plan") from e


def _grown(
    network: Transformer, role: Role, transform: Callable[[Params, Array], Params], base: Params, key: Array
) -> Params:
    """Returns the parameter tree of a role: adds adapters, quantization and the role's head to `base`, the weights that
    the role starts from."""
    tree = base if role.kind == "frozen" else transform(base, key)
    if role.head:
        tree = tree | {"head": heads.find(role.head)(network.config, weights.key_for(key, "head"))}
    return tree


def _mask(tree: Params, role: Role, what: str) -> Tree:
    """Returns a tree with True for each parameter that trains. A role of kind "initial" gets the same mask as the
    policy, since it copies the parameters that train in the policy."""
    if role.kind == "frozen":
        return jax.tree.map(lambda _: False, tree)
    try:
        return weights.trainable(tree, what)
    except ValueError as e:
        raise UserError(str(e), "config", "see the parameter table of --plan") from e


def _halves(roles: dict[str, Role], trees: Roles, mask: dict[str, Tree], shares: dict[str, str]) -> tuple[Roles, Roles]:
    """Splits {role: whole tree} into the two halves of a TrainState: `params` and `frozen`."""
    params, frozen = {}, {}
    for name, tree in trees.items():
        trained, rest = weights.partition(tree, mask[name])
        if roles[name].kind == "train":
            params[name] = trained
        elif roles[name].kind == "initial":
            rest = trained  # copies only what trains in the policy; the rest is shared with it
        if roles[name].kind != "train" or name not in shares:
            frozen[name] = rest
    return params, frozen


def _like_params(opt_state: Tree, params: Roles, places: Tree, default: Tree) -> Tree:
    """Returns shardings for the optimizer state. An array, such as a moment, gets the sharding of a parameter if it has
    the parameter's shape and its path ends in the parameter's path. Other arrays get `default`."""
    where = {}
    weights.map_named(lambda path, x, s: where.setdefault(path, (x.shape, s)), params, places)

    def place(path: str, x: Array, other: NamedSharding) -> NamedSharding:
        parts = path.split("/")
        for i in range(len(parts)):
            shape, sharding = where.get("/".join(parts[i:]), (None, None))
            if shape == x.shape:
                return sharding
        return other

    return weights.map_named(place, opt_state, default)


def first_state(cfg: Config, plan: Blueprint, pretrained: Any | None) -> TrainState:
    """Creates the state of step 0. The weights are random, or are read from a checkpoint one array at a time. Adapters
    and quantization are added afterwards. All arrays are created sharded.

    With peft.name=saved, raises UserError if the saved adapter was trained on another base model.
    """
    roles, shares, key = plan.objective.roles, dict(plan.abstract.shares), jax.random.key(cfg.seed)
    bases = {"policy": _load(plan, "policy", pretrained, key)}
    for name in plan.mask:
        if roles[name].start is not None:
            bases[name] = _load(plan, name, roles[name].start, key)

    def create(bases: Roles, key: Array) -> TrainState:
        trees = {}
        for name in plan.mask:
            base = bases.get(name, bases["policy"])
            trees[name] = _grown(plan.network(name), roles[name], plan.transform, base, key)
        halves = _halves(roles, trees, plan.mask, shares)
        return TrainState.create(*halves, plan.tx, cfg.seed, plan.abstract.shares)

    state = jax.jit(create, out_shardings=plan.shardings, donate_argnums=0)(bases, key)
    if cfg.peft.name == "saved":
        saved_adapter.check_base(cfg.peft.folder, state.role("policy"))
    return state


def _load(plan: Blueprint, role: str, start: Any | None, key: Array) -> Params:
    """Returns the sharded weights that a role starts from, without adapters or quantization."""
    network = plan.network(role)
    places = meshes.shardings(weights.axes(network.abstract, network.specs), network.abstract, plan.mesh)
    if start is None:
        return jax.jit(network.init, out_shardings=places)(key)
    return start.load(network.specs, places, network.param_dtype)
