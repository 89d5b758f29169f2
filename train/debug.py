"""`--debug` prints one batch as the model sees it, the layer outputs of one step, and the first array that is not
finite.

`--debug` writes nothing to the run folder.
"""

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from common import exits, paths
from common.errors import UserError
from common.paths import Place
from common.types import Config
from data.text.tokenizer import Tokenizer
from model import build, weights
from model.config import in_layers
from model.io import saved
from model.net.layers import Block
from model.weights import Tree
from train import init, inputs
from train.keep import hosts
from train.mesh import RULES, make_mesh
from train.state import Roles, TrainState

ROOT = Path(__file__).resolve().parents[1]


def run(cfg: Config, workdir: str | None) -> int:
    """Examines the step after the newest checkpoint of `workdir`, or step 1 if there is no checkpoint. Returns the exit
    code: exits.BROKEN if a value is not finite."""
    hosts.connect()
    with cfg.unlocked():
        cfg.model.remat = "none"  # recomputed layers would be printed twice
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), tempfile.TemporaryDirectory() as scratch:
        start = inputs.pretrained(cfg)
        tokenizer = inputs.tokenizer(cfg, start)
        data, _ = inputs.sources(cfg, tokenizer, mesh)
        model = build.model(cfg, start, tokenizer.vocab_size)
        planned = init.blueprint(cfg, model, mesh)
        state = _newest(init.first_state(cfg, planned, start), paths.parse(workdir or scratch) / "ckpt")
        batch, _ = inputs.source(planned, data, cfg.steps).next(state, int(state.step))
        _show_batch(jax.device_get(batch), tokenizer, int(state.step))
        return _examine(planned, state, batch)


def _newest(state: TrainState, folder: Place) -> TrainState:
    """Loads the state from the newest checkpoint of a run, or returns `state` itself if there is no checkpoint.
    Checksums are not verified."""
    for step in saved.steps(folder)[:1]:
        arrays = saved.named(state.replace(frozen=None))
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in arrays.items()}
        try:
            leaves = saved.read_manifest(folder / str(step))["leaves"]
            if {n: leaf["shape"] for n, leaf in leaves.items()} != {n: list(x.shape) for n, x in abstract.items()}:
                raise saved.Damaged(f"the parameter shapes in the checkpoint of step {step} do not fit this config")
            arrays = saved.read(folder / str(step), abstract)
        except saved.Damaged as e:
            raise UserError(str(e), str(folder), "use the config of the run, or omit --workdir") from e
        state = saved.fill(state.replace(frozen=None), arrays).replace(frozen=state.frozen)
    return state


def _show_batch(batch: dict, tokenizer: Tokenizer, step: int) -> None:
    from rich.console import Console

    from data.rows import batch as batches
    from data.rows.layout import painted

    console = Console(soft_wrap=True, highlight=False)
    for side, rows in batches.parts(batch).items():
        console.print(f"\n{side} 0 of step {step}: green tokens count in the loss, dim ones are context", style="bold")
        console.print(painted(rows, 0, tokenizer))
        learnt = rows["targets"][0][rows["mask"][0] > 0]
        print(f"in the loss: {len(learnt)} targets, {tokenizer.decode(learnt)!r}")
        for name, x in rows.items():
            print(f"  {name:<12} {x.dtype} {list(x.shape)}")


def _examine(planned: init.Blueprint, state: TrainState, batch: dict) -> int:
    def loss(params: Roles) -> dict:
        roles = state.replace(params=params).in_training(state.key)
        return planned.objective.loss(roles, batch, state.key)

    print("\nparameters")
    weights.map_named(lambda path, x: print(f"  {path:<44} {x.dtype} {list(x.shape)}"), state.params)
    bad = _broken(state.params) + _broken(state.frozen)
    if bad:
        return _not_finite("a parameter", bad[0])
    print("\nactivations")
    bad, metrics = _forward(lambda: loss(state.params), planned.model.config.layers)
    bad += [f"the metric {name}" for name, pair in metrics.items() if not _finite(pair)]
    if bad:
        return _not_finite("the output of", bad[0] + _first_nan(lambda: loss(state.params)))
    total, weight = (float(x) for x in metrics["loss"])
    print(f"\nloss {total / max(weight, 1e-9):.6g} averaged over a total weight of {weight:g}")
    grads = jax.jit(jax.grad(lambda params: loss(params)["loss"][0]))(state.params)
    if bad := _broken(grads):
        return _not_finite("the gradient of", bad[0])
    print("every parameter, activation, metric and gradient is finite")
    return 0


def _not_finite(kind: str, name: str) -> int:
    print(f"not finite: {kind} {name}")
    return exits.BROKEN


def _finite(tree: Tree) -> bool:
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(bool(jnp.isfinite(x).all()) for x in numbers)


def _broken(tree: Tree) -> list[str]:
    """Names of the arrays that have non-finite values. Arrays nearest to the loss come first, since backpropagation
    reaches them first. For an array that is stacked over layers, the last layer with a non-finite value is named."""
    found = []

    def look(path: str, x: Array) -> None:
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
            bad = ~jnp.isfinite(x.reshape(x.shape[0], -1)).all(1) if in_layers(path) else None
            layer = -1 if bad is None else int(jnp.max(jnp.where(bad, jnp.arange(len(bad)), -1)))
            place = 2 if "embed/" in path and "unembed" not in path else int(layer >= 0)  # 2: farthest from the loss
            found.append((place, -layer, path + (f" in layer {layer}" if layer >= 0 else "")))

    weights.map_named(look, tree)
    return [text for *_, text in sorted(found)]


def _forward(loss: Callable[[], dict], layers: int) -> tuple[list[str], dict]:
    """Computes the loss op by op, without jit, and prints the shape and maximum of each module's output. Returns (names
    of outputs that are not finite, metrics)."""
    bad, done = [], 0

    def look(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Tree:
        nonlocal done
        out = call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        x, path = jax.tree.leaves(out)[0], context.module.path
        inside = bool(path) or isinstance(context.module, Block)
        name = "/".join((f"layers/{done % layers}", *path)) if inside else "final_norm"
        broken = not _finite(x)
        if broken or not path or done == 0:  # after the first layer, print only the outputs of whole blocks
            top = float(jnp.abs(x).max())
            print(f"  {name:<44} {x.dtype} {list(x.shape)}  max |x| {top:.4g}")
        if broken:
            bad.append(name)
        done += isinstance(context.module, Block)
        return out

    with jax.disable_jit(), nn.intercept_methods(look):
        metrics = loss()
    return bad, metrics


def _first_nan(loss: Callable[[], Tree]) -> str:
    """Finds the line of code that produces the first NaN. Returns "" if there are infinities but no NaN."""
    try:
        with jax.disable_jit(), jax.debug_nans(True):
            loss()
    except FloatingPointError as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).is_relative_to(ROOT / "model")]
        if frames:
            return f"; the first NaN comes from {Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"
    return ""
