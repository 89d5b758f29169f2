"""Compiles a step for given devices, and estimates its memory, traffic, time and cost."""

import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common import chips
from common.types import Config, Json
from data.rows import batch as batches
from infer import batch
from model.net import head
from tools.plan import hlo, topology
from train import cost, init
from train import mesh as meshes
from train import plan as plans
from train.step import compile_step

ASSUMED = (
    "The low end of the time assumes that computation and communication fully overlap and that arrays pass through HBM"
    " once. The high end assumes that nothing overlaps, that every operand and result passes through HBM, and that a"
    " collective uses the links of only one torus axis. Both assume that kernels reach the chip's peak rates. Many do"
    " not: the only GPU step that was timed took 1.3 times the high end.",
    "Every position of a batch is assumed to count in the loss, and loops over the head's chunks to run to their end.",
    "Money and energy are for the steps only: compilation, evaluation and waiting are not included.",
)


def plan(cfg: Config, model: Any, devices: list[jax.Device], what: str = "train") -> Json:
    """Plans one step. `what` is "train" for a training step, or "decode" for a step that adds one token to each row."""
    mesh = meshes.make_mesh(cfg.mesh, devices)
    rows, shards = cfg.data.batch_size, meshes.row_shards(cfg, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        planned = init.blueprint(cfg, model, mesh)
        lowered, arguments = (train_step if what == "train" else decode_step)(cfg, planned)
        held = {name: cost.bytes_per_device(x, jax.tree.map(lambda a: a.sharding, x)) for name, x in arguments.items()}
        out = {"what": what, "device": devices[0].device_kind, "config": plans.describe(cfg, planned)}
        local = rows // shards // cfg.accum * len(_sides(cfg, planned)) * cfg.data.seq_len
        local //= mesh.shape["context"]
        chunk = head.chunk_rows(local, planned.model.config.vocab_size)
        out |= {"mesh": dict(mesh.shape), "rows": rows, "accum": cfg.accum, "bytes": held, "assumed": ASSUMED}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            verdict = re.sub(r"\s+", " ", str(e))[:240]
            return out | {"fits": False, "verdict": verdict, "turn": knob(cfg, held, devices[0])}
    memory = compiled.memory_analysis()
    held |= {"arguments": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
    held["peak"] = memory.peak_memory_in_bytes
    fits, verdict = topology.room(held["peak"]) if devices[0].platform == "gpu" else (True, "according to libtpu")
    if not fits:
        return out | {"fits": False, "verdict": verdict, "turn": knob(cfg, held, devices[0])}
    if what == "train":
        held["logits_chunk"] = 4 * chunk * planned.model.config.vocab_size
        held["gradients"] = out["config"]["bytes_per_device"]["gradients"]
    # In training, the only loop of unknown length is the head's loop over chunks. In decoding, it is the loop over new
    # tokens. One of its iterations is counted, which makes one token per row.
    program = hlo.Program(compiled.as_text(), -(-local // chunk) if what == "train" else 1)
    out |= {"fits": True, "verdict": verdict, "largest": program.largest(6)}
    out |= {"sent": program.sent(dict(mesh.shape)), "traffic": program.traffic()}
    return out | outlook(cfg, planned, out, devices)


def train_step(cfg: Config, planned: Any) -> tuple[Any, Json]:
    """Returns the lowered training step of train.main, and the step's arguments by kind."""
    state = jax.tree.map(_placed, planned.abstract, planned.shardings)

    def place(x: batches.Spec) -> jax.ShapeDtypeStruct:
        return _placed(x, NamedSharding(planned.mesh, P(*meshes.BATCH[: len(x.shape)])))

    batch = jax.tree.map(place, batches.abstract(planned.objective.batch, cfg.data.batch_size, cfg.data.seq_len))
    kinds = {"params": state.params, "optimizer": state.opt_state, "frozen": state.frozen, "batch": batch}
    return compile_step(planned, cfg.accum).lower(state, batch), kinds


def decode_step(cfg: Config, planned: Any) -> tuple[Any, Json]:
    """Returns the lowered decoding step of infer.batch, and the step's arguments by kind. Rows are sharded over the
    mesh axes data and fsdp, and the cache also over the axis tensor."""
    model, mesh, rows = planned.model, planned.mesh, cfg.data.batch_size
    stacked = jax.tree.map(_placed, planned.abstract.role("policy"), planned.shardings.role("policy"))
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(mesh, P(*x.sharding.spec[1:])))
    layers = jax.tree.map(one, stacked["layers"])
    parts = lambda i: {k: tree for k, tree in layers.items() if i in model.config.stack(f"layers/{k}")}
    axes = ("data", "fsdp", "tensor")

    def place(x: Any) -> Any:
        """Shards the leading axis, which has one entry for each row or, in the cache, for each key head of each row."""
        over = axes if x.ndim == 3 else axes[:2]
        fits = x.ndim and x.shape[0] % math.prod(mesh.shape[a] for a in over) == 0
        return _placed(x, NamedSharding(mesh, P(over) if fits else P()))

    inputs = batch.arrays([None] * rows)
    cache, inputs = jax.tree.map(place, jax.eval_shape(lambda: (model.cache(rows, cfg.data.seq_len), inputs)))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    params = {**stacked, "layers": tuple(map(parts, range(model.config.layers)))}
    lowered = batch._decode.lower(model, params, cache, inputs, number, number)
    return lowered, {"params": params, "cache": cache}


def _sides(cfg: Config, planned: Any) -> dict[str, batches.Batch]:
    return batches.parts(batches.abstract(planned.objective.batch, cfg.data.batch_size, cfg.data.seq_len))


def _placed(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def flops(cfg: Config, planned: Any, what: str) -> tuple[float, float, int]:
    """Returns (model FLOPs, FLOPs including recomputation, tokens) of a step, summed over all devices."""
    rows, length = cfg.data.batch_size, cfg.data.seq_len
    if what == "decode":  # every row is assumed to attend to all columns of the cache
        policy = cost.of_roles(planned, 2 * length - 1)["policy"]
        model = rows * (policy.layer_flops + policy.head_flops)
        return model, model, rows
    price = cost.of_plan(planned, length)
    sides = len(_sides(cfg, planned))
    tokens = rows * length * sides
    model = price.step(tokens, tokens)
    policy = cost.of_roles(planned, length)["policy"]
    again = policy.layer_flops * (planned.model.remat == "full") + policy.head_flops * (sides > 1)
    return model, model + tokens * again, tokens


def outlook(cfg: Config, planned: Any, out: Json, devices: list[jax.Device]) -> Json:
    """Returns time, rates, cost and energy as (low, high) ranges. If common/chips.json does not list the chip, returns
    only FLOPs and tokens."""
    model, hardware, tokens = flops(cfg, planned, out["what"])
    numbers = {"flops_per_step": model, "flops_with_recomputation": hardware, "tokens_per_step": tokens}
    if not (chip := chips.find(out["device"])):
        return numbers
    n, held = len(devices) / chip.devices, out["bytes"]
    peak, hbm, ici = (x.value / chip.devices for x in (chip.tflops, chip.hbm_bandwidth, chip.ici_bandwidth))
    once = sum(held.get(k, 0) for k in ("params", "optimizer", "frozen", "batch", "cache"))
    if out["what"] == "train":  # parameters and optimizer state are also written
        once += held["params"] + held["optimizer"]
    between = sum(out["sent"].get(hlo.BETWEEN, {}).values())
    if between and not chip.dcn_bandwidth:
        return numbers  # the bandwidth of the network between slices is unknown
    sent = sum(sum(kinds.values()) for kinds in out["sent"].values()) - between
    torus = max(sum(len(set(axis)) > 1 for axis in zip(*(getattr(d, "coords", (0,)) for d in devices))), 1)
    terms = {"compute": (hardware / len(devices) / (peak * 1e12),) * 2}
    terms["HBM"] = (once / hbm, max(out["traffic"], once) / hbm)
    terms["links"] = (sent / ici, torus * sent / ici)
    terms |= {"data center network": (between * chip.devices / chip.dcn_bandwidth.value,) * 2} if between else {}
    low, high = max(t for t, _ in terms.values()), sum(t for _, t in terms.values())
    numbers |= {"seconds_by": terms, "seconds": (low, high), "tokens_per_second": (tokens / high, tokens / low)}
    numbers["mfu"] = tuple(model / (t * n * chip.tflops.value * 1e12) for t in (high, low))
    if out["what"] == "decode":
        return numbers
    hours = [cfg.steps * t * n / 3600 for t in (low, high)]
    times = lambda x, y=1.0: x and (hours[0] * x.low * y, hours[1] * x.high * y)
    run = {"chip_hours": hours, "usd": times(chip.usd_hour), "usd_spot": times(chip.usd_hour_spot)}
    return numbers | {"run": run | {"kwh": times(chip.watts, chips.site().pue.value / 1000)}}


def knob(cfg: Config, held: dict[str, int], device: Any) -> str:
    """Suggests what to change if the step does not fit into memory."""
    chip, total = chips.find(device.device_kind), sum(held.values())
    if chip and total > 0.9 * chip.hbm_bytes.value / chip.devices:
        return f"arrays take {total / 1e9:.1f} GB per device: use more devices on config.mesh.fsdp, or LoRA"
    if "cache" in held:
        return "lower config.data.batch_size (rows) or config.data.seq_len (cache)"
    if cfg.model.remat != "full":
        return "set config.model.remat=full"
    return (
        f"set config.accum={2 * cfg.accum} (more micro-batches), then raise config.mesh.tensor or config.mesh.context"
    )
