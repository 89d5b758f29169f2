"""Reads, writes and verifies the checkpoints of a run folder.

Each checkpoint is a folder `ckpt/<step>`. It contains the arrays, which Orbax writes, and the manifest
`state_hashes.json`, which lists the files and a digest of each array. The digests reveal flipped bits, which Orbax does
not detect.
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

Leaves = dict[str, Any]  # {name: array or its shape}
MANIFEST = "state_hashes.json"
NAME = re.compile(r"[A-Za-z0-9_.'\[\]-]+(/[A-Za-z0-9_.'\[\]-]+)*")
STEP = re.compile(r"0|[1-9][0-9]{0,8}")
# Limit on the total size of a checkpoint's arrays: DENSEST times the size of its compressed files, plus SLACK bytes.
DENSEST, SLACK = 64, 256 << 20


class Damaged(Exception):
    """Raised if a checkpoint cannot be loaded. The message is one line that names the parameter and the file."""


def named(tree: Tree) -> Leaves:
    """Flattens a tree to a dict such as {"params/policy/embed/table": array}. Orbax cannot save `Weight` objects.

    Raises ValueError for duplicate names, and for names with special characters, because Orbax would silently load
    wrong values for them.
    """
    out: Leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        key = weights.name(path)
        if key in out or not plain(key):
            problem = "duplicate name" if key in out else "special characters"
            raise ValueError(f"cannot save an array as {key!r}: {problem}")
        out[key] = leaf
    return out


def plain(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and not {".", ".."} & set(name.split("/"))


def fill(tree: Tree, arrays: Leaves) -> Tree:
    """Replaces each leaf of `tree` by the array of the same name. Raises KeyError if an array is missing."""
    return weights.map_named(lambda key, _: arrays[key], tree)


@jax.jit
def digest(x: Array) -> Array:
    """Returns a 64-bit digest of an array as uint32[2]. The digest does not depend on how the array is sharded.

    The digest consists of two sums modulo 2^32. In each sum, every 32-bit word of the array is multiplied by an odd
    number that depends on the word's position. Odd factors are invertible modulo 2^32, so a change of one word always
    changes the digest. Any other change leaves the digest the same with a probability of about 2^-63. Because the order
    of summation does not matter, each device sums its own shard, and the array is not gathered.
    """
    x = _words(x)
    position = positions(x.shape)
    return jnp.stack([jnp.sum(x * (scramble(position ^ jnp.uint32(salt)) | 1)) for salt in (0, 0x9E3779B9)])


def positions(shape: tuple[int, ...]) -> Array:
    """Returns a uint32 array of `shape` that contains each element's row-major position modulo 2^32."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return position


def _words(x: Array) -> Array:
    """Returns the bits of an array as uint32 words: one word per element, or two per 8-byte element."""
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.int8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def scramble(x: Array) -> Array:
    """Applies the 32-bit finalizer of MurmurHash3, a hash that maps neighboring numbers to unrelated numbers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def digests(arrays: Leaves) -> dict[str, str]:
    """Returns {name: digest as 16 hex digits}. All digests are computed asynchronously."""
    pending = {name: digest(x) for name, x in arrays.items()}
    return {name: "{:08x}{:08x}".format(*lanes) for name, lanes in jax.device_get(pending).items()}


def fingerprint(tree: Tree) -> str:
    """Returns one hash of the names and arrays in a tree, or "" if there are no arrays. Derived fields are left out."""
    hashes = digests(named(weights.underived(tree)))
    lines = json.dumps(hashes, sort_keys=True).encode()
    return hashlib.blake2b(lines, digest_size=8).hexdigest() if hashes else ""


def fingerprints(frozen: dict[str, Params]) -> dict[str, str]:
    """Returns {role: fingerprint} for {role: tree of frozen parameters}, where a role is "policy", for example. Roles
    without arrays are left out."""
    return {role: digest for role, tree in frozen.items() if (digest := fingerprint(tree))}


def describe(arrays: Leaves) -> dict[str, dict]:
    """Returns the manifest entry (shape, dtype and digest) of each array."""
    hashes = digests(arrays)
    return {n: {"shape": list(x.shape), "dtype": str(x.dtype), "hash": hashes[n]} for n, x in arrays.items()}


def write(folder: Place, params: Params, manifest: dict) -> None:
    """Saves {role: tree of parameters} as a checkpoint that `load_params` can read.

    `manifest` has all fields of the checkpoint's manifest except the lists of arrays and files, which are added.
    """
    arrays = named({"params": params})
    orbax().save(folder if paths.remote(folder) else folder.resolve(), arrays)
    finish(folder, manifest | {"leaves": describe(arrays)})


def finish(folder: Place, manifest: dict) -> None:
    """Writes the manifest of a checkpoint. It is written last, because it marks the checkpoint as complete.

    The manifest lists only the files that are needed to read the checkpoint. It omits Orbax's empty marker files, which
    may get lost when a checkpoint is copied.
    """
    found = sorted(paths.sizes(folder).items())
    needed = {name: size for name, size in found if name == "_CHECKPOINT_METADATA" or name.startswith("state/")}
    files.write(folder / MANIFEST, seal(manifest | {"files": needed}))


def seal(manifest: dict) -> str:
    """Converts a manifest to text, and adds a checksum."""
    body = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps({"check": zlib.crc32(body.encode()), "manifest": manifest}, sort_keys=True) + "\n"


def read_manifest(folder: Place) -> dict:
    """Returns the manifest of a checkpoint.

    Raises Damaged if the manifest is missing or was altered, or if a listed file is missing or has a different size.
    """
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
        raise Damaged(f"{path} is not a valid manifest: {first_line(e)}") from None
    found = paths.sizes(folder)
    for name, size in manifest["files"].items():
        if (has := found.get(name)) != size:
            raise Damaged(f"{folder / name} " + ("is missing" if has is None else f"has {has} bytes, not {size}"))
    return manifest


def _check_entries(manifest: dict) -> None:
    """Raises KeyError, TypeError, AttributeError or ValueError if `seal` cannot have written the manifest."""
    kinds = {"step": int, "leaves": dict, "frozen": (dict, str), "source": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its field {name!r} has the type {type(manifest[name]).__name__}")
    if not all(type(n) is int for n in manifest["source"].get("seen", {}).values()):
        raise ValueError("its field 'seen' must contain integers")
    for name, leaf in manifest["leaves"].items():
        jnp.dtype(leaf["dtype"])
        if not all(type(n) is int and n >= 0 for n in leaf["shape"]) or not isinstance(leaf["hash"], str):
            raise ValueError(f"its entry for {name} has no valid shape or hash")


class _Patient:
    """An event loop that waits for its running tasks before it closes.

    If reading or writing an array fails, Orbax closes the event loop while tasks for other arrays are still running.
    Without waiting, each of these tasks would print a traceback.
    """

    def close(self) -> None:
        if not self.is_closed():
            # Orbax raises the first error; by default, asyncio logs all others
            self.set_exception_handler(lambda *_: None)
            if left := asyncio.all_tasks(self):
                self.run_until_complete(asyncio.wait(left, timeout=10))
        super().close()


def orbax() -> ModuleType:
    """Imports Orbax's v1 API and silences its log, because all problems are raised as exceptions."""
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
    """Returns the steps of all checkpoints that appear complete, newest first.

    On disk, a checkpoint's folder is renamed to its step once the checkpoint is complete. An object store cannot rename
    folders, so there, a checkpoint appears complete if it has a manifest. To make sure that a checkpoint is complete,
    call `read_manifest` and `verify`.
    """
    if not folder.is_dir():
        return []
    found = [p.parent for p in folder.glob(f"*/{MANIFEST}")] if paths.remote(folder) else folder.iterdir()
    return sorted((int(p.name) for p in found if STEP.fullmatch(p.name) and p.is_dir()), reverse=True)


def read(folder: Place, abstract: Leaves) -> Leaves:
    """Reads the arrays whose names are the keys of `abstract`. Raises Damaged if an array cannot be read.

    Does not check the digests; use `verify` for this. Where `abstract` contains a numpy array, the result contains one
    too. Where `abstract` contains a shape or a JAX array, the result is a JAX array with the same sharding, even if the
    array was saved with another sharding.
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
    """Raises Damaged if the digest of an array differs from its digest in the manifest."""
    hashes = digests(arrays)
    for name in arrays:
        if hashes[name] != manifest["leaves"][name]["hash"]:
            raise Damaged(f"{name} in {folder / 'state'} differs from what was saved: a bit has flipped on disk")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's root cause. Orbax wraps root causes in other errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Saved(NamedTuple):
    """The trained parameters of a run.

    Frozen weights are not saved, because they can be restored from the run's config.
    """

    step: int
    config: dict
    params: dict[str, np.ndarray]  # {"policy/layers/attn/wq/a": array, ...}; frozen parameters are left out
    frozen: dict[str, str] | str  # `fingerprints` of the weights that were frozen during training


def load_params(workdir: str | Path, step: int | None = None, verified: bool = True) -> Saved:
    """Reads the trained parameters of a run folder into host memory, without the optimizer state.

    Reads the checkpoint of `step`, or the newest complete checkpoint if `step` is None. The run may still be training.
    Raises UserError if there is no complete checkpoint.
    """
    workdir, problem = paths.parse(workdir), "the run folder contains no checkpoint"
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
    raise UserError(problem, str(workdir), "train the run first, or specify another step")


def _finite(x: np.ndarray) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(np.isfinite(x).all())


def check_base(run: Saved, policy: Params, where: str | Place) -> None:
    """Raises UserError if the frozen parameters of `policy` differ from those with which the run was trained."""
    frozen = weights.map_named(lambda path, x: None if f"policy/{path}" in run.params else x, policy)
    if isinstance(run.frozen, str):  # older runs have a single fingerprint for all roles
        known = (fingerprint(tree) for tree in ({"policy": frozen}, {"policy": frozen, "ref": policy}))
        same = not run.frozen or run.frozen in known
    else:
        same = run.frozen.get("policy", "") == fingerprint(frozen)
    if not same:
        raise UserError("the adapters were trained on another base model than this one", str(where))


def put(run: Saved, policy: Params, where: str | Place) -> Params:
    """Replaces parameters of `policy` by the trained parameters of a run. Keeps the dtypes and shardings of `policy`.

    Raises UserError if names or shapes do not match, or if a parameter is missing.
    """
    trained = {k.removeprefix("policy/"): v for k, v in run.params.items() if k.startswith("policy/")}
    if strange := trained.keys() - named(policy).keys():
        what = f"the run trained {min(strange)}, but the model that its config describes has no such parameter"
        raise UserError(what, str(where))

    def like(name: str, x: Array | jax.ShapeDtypeStruct) -> Array:
        value = trained.get(name)
        if value is None:
            if isinstance(x, jax.ShapeDtypeStruct):
                raise UserError(f"the checkpoint does not contain {name}", str(where))
            return x
        if value.shape != x.shape:
            raise UserError(f"{name} was saved with shape {value.shape}, but the model needs {x.shape}", str(where))
        value = value.astype(x.dtype)
        return jnp.asarray(value) if isinstance(x, jax.core.Tracer) else jax.device_put(value, x.sharding)

    return weights.map_named(like, policy)


def _wanted(manifest: dict) -> dict[str, np.ndarray]:
    """Allocates the host arrays into which the parameters are read.

    Raises ValueError for manifest entries that no run can have written, such as an array larger than its files.
    """
    kinds, room = {}, SLACK + DENSEST * sum(manifest["files"].values())
    for name, leaf in manifest["leaves"].items():
        if name.startswith("params/"):
            dtype, shape = jnp.dtype(leaf["dtype"]), leaf["shape"]
            if not plain(name) or not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
                raise ValueError(f"{name!r} of dtype {dtype} cannot be a parameter")
            kinds[name], room = (shape, dtype), room - math.prod(shape) * dtype.itemsize
            if room < 0:
                raise ValueError(f"{name} of shape {shape} is larger than the files of the checkpoint can hold")
    return {name: np.empty(*kind) for name, kind in kinds.items()}
