"""Reads and describes checkpoints: a tree as named arrays, their digests, and the steps of a run folder.

A step is the folder `ckpt/<step>`: an Orbax checkpoint of {name: array}, and the manifest `state_hashes.json`, which
lists its contents and digests. Orbax itself does not notice a flipped bit.
"""

import asyncio
import hashlib
import json
import logging
import math
import re
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common import files, paths
from common.errors import UserError
from common.paths import Place
from model import weights
from model.weights import Params, Tree

Leaves = dict[str, Any]  # {path: array or its shape}
MANIFEST = "state_hashes.json"
NAME = re.compile(r"[A-Za-z0-9_.'\[\]-]+(/[A-Za-z0-9_.'\[\]-]+)*")
STEP = re.compile(r"0|[1-9][0-9]{0,8}")
# A checkpoint's arrays may take at most DENSEST times the bytes of its compressed files, plus SLACK bytes.
DENSEST, SLACK = 64, 256 << 20


class Damaged(Exception):
    """A checkpoint step that cannot be loaded. The message is one line, which names the parameter and the file."""


def named(tree: Tree) -> Leaves:
    """The leaves by name: {"params/policy/embed/table": leaf}, so that Orbax never sees the tree's own node types.

    Raises ValueError for duplicate names and names that are not plain, since Orbax would silently load wrong values.
    """
    out: Leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        key = weights.name(path)
        if key in out or not plain(key):
            raise ValueError(f"cannot save a leaf as {key!r}: {'taken twice' if key in out else 'not a plain name'}")
        out[key] = leaf
    return out


def plain(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and not {".", ".."} & set(name.split("/"))


def fill(tree: Tree, arrays: Leaves) -> Tree:
    """`tree` with the named arrays as its leaves. Raises KeyError if an array is missing."""
    return weights.map_named(lambda key, _: arrays[key], tree)


@jax.jit
def digest(x: Array) -> Array:
    """A 64-bit digest as uint32[2], equal for every sharding of the same array.

    It consists of two sums, modulo 2^32, of the array's words, each times an odd number that depends on its position.
    Odd factors are invertible, so a change in one word always shows. Any other change is missed with a probability of
    about 2^-63. Addition is order-independent: every device sums its own part, and nothing is gathered.
    """
    x = _words(x)
    position = positions(x.shape)
    return jnp.stack([jnp.sum(x * (scramble(position ^ jnp.uint32(salt)) | 1)) for salt in (0, 0x9E3779B9)])


def positions(shape: tuple[int, ...]) -> Array:
    """uint32 of `shape`: the position of each element in row-major order, modulo 2^32."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return position


def _words(x: Array) -> Array:
    """The bits of an array as uint32: one word per element, or two for 8-byte types."""
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.int8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def scramble(x: Array) -> Array:
    """MurmurHash3's 32-bit finalizer: neighboring inputs get unrelated values."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def digests(arrays: Leaves) -> dict[str, str]:
    """{name: digest as sixteen hex digits}. All digests are started before the first is awaited."""
    pending = {name: digest(x) for name, x in arrays.items()}
    return {name: "{:08x}{:08x}".format(*lanes) for name, lanes in jax.device_get(pending).items()}


def fingerprint(tree: Tree) -> str:
    """One digest of a whole tree, including names but not derived fields; "" for a tree without arrays."""
    hashes = digests(named(weights.underived(tree)))
    lines = json.dumps(hashes, sort_keys=True).encode()
    return hashlib.blake2b(lines, digest_size=8).hexdigest() if hashes else ""


def fingerprints(frozen: dict[str, Params]) -> dict[str, str]:
    """{role: fingerprint} from {role: frozen tree}, without roles that have no arrays."""
    return {role: digest for role, tree in frozen.items() if (digest := fingerprint(tree))}


def describe(arrays: Leaves) -> dict[str, dict]:
    """{name: entry in the manifest} for each array."""
    hashes = digests(arrays)
    return {n: {"shape": list(x.shape), "dtype": str(x.dtype), "hash": hashes[n]} for n, x in arrays.items()}


def write(folder: Place, params: Params, manifest: dict) -> None:
    """Saves {role: tree} as a step that `load_params` can read; `manifest` holds the other fields of its manifest."""
    arrays = named({"params": params})
    orbax().save(folder if paths.remote(folder) else folder.resolve(), arrays)
    finish(folder, manifest | {"leaves": describe(arrays)})


def finish(folder: Place, manifest: dict) -> None:
    """Writes the manifest of a step, which is its last file and marks the step as complete.

    The manifest lists only files that are needed to read the step, since copying it may lose Orbax's empty markers.
    """
    found = sorted(paths.sizes(folder).items())
    needed = {name: size for name, size in found if name == "_CHECKPOINT_METADATA" or name.startswith("state/")}
    files.write(folder / MANIFEST, seal(manifest | {"files": needed}))


def seal(manifest: dict) -> str:
    """The manifest as text, with a checksum."""
    body = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps({"check": zlib.crc32(body.encode()), "manifest": manifest}, sort_keys=True) + "\n"


def read_manifest(folder: Place) -> dict:
    """The manifest of a step. Raises Damaged if it is missing or altered, or if a listed file has another size."""
    path = folder / MANIFEST
    try:
        box = files.strict(path.read_text("utf-8"))
        manifest = box["manifest"]
        if zlib.crc32(json.dumps(manifest, sort_keys=True).encode()) != box["check"]:
            raise ValueError("its checksum is wrong")
        _check_entries(manifest)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the save was not finished") from None
    except Exception as e:
        raise Damaged(f"{path} is not a manifest: {first_line(e)}") from None
    found = paths.sizes(folder)
    for name, size in manifest["files"].items():
        if (has := found.get(name)) != size:
            raise Damaged(f"{folder / name} " + ("is missing" if has is None else f"has {has} bytes, not {size}"))
    return manifest


def _check_entries(manifest: dict) -> None:
    """Raises KeyError, TypeError, AttributeError or ValueError for a manifest that `seal` cannot have written."""
    kinds = {"step": int, "leaves": dict, "frozen": (dict, str), "source": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its {name!r} is a {type(manifest[name]).__name__}")
    if not all(type(n) is int for n in manifest["source"].get("seen", {}).values()):
        raise ValueError("its 'seen' must hold counts")
    for name, leaf in manifest["leaves"].items():
        jnp.dtype(leaf["dtype"])
        if not all(type(n) is int and n >= 0 for n in leaf["shape"]) or not isinstance(leaf["hash"], str):
            raise ValueError(f"its entry of {name} has no valid shape or hash")


class _Patient:
    """An event loop that waits for its tasks before it closes. When one array cannot be read or written, Orbax closes
    the loop while other arrays' tasks are running; without the wait, each of these tasks would print a traceback."""

    def close(self) -> None:
        if not self.is_closed():
            self.set_exception_handler(lambda *_: None)  # Orbax raises the first error; asyncio would log the others
            if left := asyncio.all_tasks(self):
                self.run_until_complete(asyncio.wait(left, timeout=10))
        super().close()


def orbax() -> ModuleType:
    """Orbax's v1 interface with its log disabled: all problems are exceptions, which are reported in one line."""
    import uvloop
    from orbax.checkpoint import v1

    uvloop.new_event_loop = type("Loop", (_Patient, uvloop.Loop), {})
    asyncio.new_event_loop = type("Loop", (_Patient, asyncio.SelectorEventLoop), {})

    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
    return v1


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def steps(folder: Place) -> list[int]:
    """Steps that seem complete, newest first. Only `read_manifest` and the digests show whether they really are.

    On disk the folder of a step gets its name once it is complete. In an object store, which cannot rename folders, the
    manifest is written last.
    """
    if not folder.is_dir():
        return []
    found = [p.parent for p in folder.glob(f"*/{MANIFEST}")] if paths.remote(folder) else folder.iterdir()
    return sorted((int(p.name) for p in found if STEP.fullmatch(p.name) and p.is_dir()), reverse=True)


def read(folder: Place, abstract: Leaves) -> Leaves:
    """The arrays named in `abstract`: numpy arrays if it holds numpy arrays, else JAX arrays with its shardings.
    These may differ from the shardings of the saved arrays.

    Raises Damaged. The values are not verified: see `verify`.
    """
    ocp = orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            arrays = ocp.load(folder if paths.remote(folder) else folder.resolve(), abstract)
    except Exception as e:
        raise Damaged(f"{folder} cannot be read: {first_line(e)}") from e
    for name, want in abstract.items():
        x = arrays.get(name)
        if not isinstance(x, (jax.Array, np.ndarray)) or (x.shape, x.dtype) != (want.shape, want.dtype):
            raise Damaged(f"{name} is missing in {folder / 'state'}")
    return arrays


def verify(folder: Place, arrays: Leaves, manifest: dict) -> None:
    """Raises Damaged for the first array whose values differ from the saved ones."""
    hashes = digests(arrays)
    for name in arrays:
        if hashes[name] != manifest["leaves"][name]["hash"]:
            raise Damaged(f"{name} in {folder / 'state'} differs from what was saved: a bit has flipped on disk")


def first_line(error: BaseException) -> str:
    """The root cause of an error in one line; Orbax wraps it in other errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Saved(NamedTuple):
    """The trained parameters of a run. Its frozen weights are not saved, since the config determines them."""

    step: int
    config: dict
    params: dict[str, np.ndarray]  # "policy/layers/attn/wq/a" and so on; only adapters if only they were trained
    frozen: dict[str, str] | str  # `fingerprints` of the frozen weights during training


def load_params(workdir: str | Path, step: int | None = None, verified: bool = True) -> Saved:
    """The trained parameters of a run folder, in host memory; optimizer state is not read.

    Reads `step`, or the newest complete one; the run may still be training. Raises UserError if there is none.
    """
    workdir, problem = paths.parse(workdir), "it holds no checkpoint"
    for at in steps(workdir / "ckpt") if step is None else [step]:
        folder = workdir / "ckpt" / str(at)
        try:
            manifest = read_manifest(folder)
            arrays = read(folder, _wanted(manifest))
            if verified:
                verify(folder, arrays, manifest)
            if broken := next((name for name, x in arrays.items() if not _finite(x)), None):
                raise UserError(f"{broken} holds NaN or infinities", str(folder))
            config = files.load_json(workdir / "config.json")
            params = {name.removeprefix("params/"): x for name, x in arrays.items()}
            return Saved(at, config, params, manifest["frozen"])
        except Damaged as e:
            problem = str(e)
        except UserError:
            raise
        except Exception as e:
            raise UserError(first_line(e), str(workdir), "is this a run folder?") from e
    raise UserError(problem, str(workdir), "train it first, or name another step")


def _finite(x: np.ndarray) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(np.isfinite(x).all())


def check_base(run: Saved, policy: Params, where: str | Place) -> None:
    """Raises UserError if the frozen parameters of `policy` differ from those with which a run was trained."""
    frozen = weights.map_named(lambda path, x: None if f"policy/{path}" in run.params else x, policy)
    if isinstance(run.frozen, str):  # older runs have one digest for all roles
        known = (fingerprint(tree) for tree in ({"policy": frozen}, {"policy": frozen, "ref": policy}))
        same = not run.frozen or run.frozen in known
    else:
        same = run.frozen.get("policy", "") == fingerprint(frozen)
    if not same:
        raise UserError("the adapters were trained on another base than this one", str(where))


def put(run: Saved, policy: Params, where: str | Place) -> Params:
    """`policy` with the trained parameters of a run, in the dtypes and shardings of `policy`. Raises UserError."""
    trained = {k.removeprefix("policy/"): v for k, v in run.params.items() if k.startswith("policy/")}
    if strange := trained.keys() - named(policy).keys():
        raise UserError(f"the run trained {min(strange)}, which is not in a model of its config", str(where))

    def like(name: str, x: Array | jax.ShapeDtypeStruct) -> Array:
        value = trained.get(name)
        if value is None:
            if isinstance(x, jax.ShapeDtypeStruct):
                raise UserError(f"the checkpoint does not contain {name}", str(where))
            return x
        if value.shape != x.shape:
            raise UserError(f"{name} was saved with shape {value.shape}, the model needs {x.shape}", str(where))
        value = value.astype(x.dtype)
        return jnp.asarray(value) if isinstance(x, jax.core.Tracer) else jax.device_put(value, x.sharding)

    return weights.map_named(like, policy)


def _wanted(manifest: dict) -> dict[str, np.ndarray]:
    """Empty host arrays to read the parameters into. Raises ValueError for entries that no run can have saved."""
    kinds, room = {}, SLACK + DENSEST * sum(manifest["files"].values())
    for name, leaf in manifest["leaves"].items():
        if name.startswith("params/"):
            dtype, shape = jnp.dtype(leaf["dtype"]), leaf["shape"]
            if not plain(name) or not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
                raise ValueError(f"{name!r} of type {dtype} is not a parameter")
            kinds[name], room = (shape, dtype), room - math.prod(shape) * dtype.itemsize
            if room < 0:
                raise ValueError(f"{name} of shape {shape} is larger than the files of the checkpoint can hold")
    return {name: np.empty(*kind) for name, kind in kinds.items()}
