"""Checkpoints as data: a tree as named arrays, their digests, and reading one step of a run folder back.

A step is the folder `ckpt/<step>`: an Orbax checkpoint of {name: array}, and `state_hashes.json`, the manifest, which
says what must be in it. Orbax itself does not notice a flipped bit.
"""

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

Leaves = dict[str, Any]  # path -> array, or its shape
MANIFEST = "state_hashes.json"
NAME = re.compile(r"[A-Za-z0-9_.'\[\]-]+(/[A-Za-z0-9_.'\[\]-]+)*")
STEP = re.compile(r"0|[1-9][0-9]{0,8}")


class Damaged(Exception):
    """A step that must not be loaded; the message is one line that names the leaf and the file."""


def named(tree: Tree) -> Leaves:
    """{"params/policy/embed/table": leaf}: Orbax never sees the tree's own node types.

    Raises ValueError for a name that two leaves share or that is not plain: Orbax would load wrong values silently.
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
    """`tree` with the named arrays as its leaves. Raises KeyError for one that is missing."""
    return weights.map_named(lambda key, _: arrays[key], tree)


@jax.jit
def digest(x: Array) -> Array:
    """A 64-bit digest as uint32[2], equal for every sharding of the same array.

    Sums, modulo 2^32, the words of the array times an odd number drawn from each word's position; two such sums. An odd
    factor is invertible, so a change within one word always shows; any other change hides with a chance of about 2^-63.
    Addition does not care about order: every device sums what it holds, on the device, and nothing is gathered.
    """
    x = _words(x)
    position = positions(x.shape)
    return jnp.stack([jnp.sum(x * (scramble(position ^ jnp.uint32(salt)) | 1)) for salt in (0, 0x9E3779B9)])


def positions(shape: tuple[int, ...]) -> Array:
    """uint32 of `shape`: the place of each element in row-major order, modulo 2^32."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return position


def _words(x: Array) -> Array:
    """The bits of an array as uint32: one word an element, two for 8-byte types."""
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.int8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def scramble(x: Array) -> Array:
    """MurmurHash3's 32-bit finalizer: neighbors get unrelated values."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def digests(arrays: Leaves) -> dict[str, str]:
    """Sixteen hex digits for each array. All are started before the first is awaited."""
    pending = {name: digest(x) for name, x in arrays.items()}
    return {name: "{:08x}{:08x}".format(*lanes) for name, lanes in jax.device_get(pending).items()}


def fingerprint(tree: Tree) -> str:
    """One digest for a whole tree, names included and derived fields left out; "" for a tree without arrays."""
    hashes = digests(named(weights.underived(tree)))
    lines = json.dumps(hashes, sort_keys=True).encode()
    return hashlib.blake2b(lines, digest_size=8).hexdigest() if hashes else ""


def fingerprints(frozen: dict[str, Params]) -> dict[str, str]:
    """{role: fingerprint} of {role: frozen tree}, without the roles that hold no array."""
    return {role: digest for role, tree in frozen.items() if (digest := fingerprint(tree))}


def describe(arrays: Leaves) -> dict[str, dict]:
    """The manifest's entry for each array."""
    hashes = digests(arrays)
    return {n: {"shape": list(x.shape), "dtype": str(x.dtype), "hash": hashes[n]} for n, x in arrays.items()}


def write(folder: Place, params: Params, manifest: dict) -> None:
    """Saves {role: tree} as a step that `load_params` reads; `manifest` says what is not in the arrays."""
    arrays = named({"params": params})
    orbax().save(folder if paths.remote(folder) else folder.resolve(), arrays)
    finish(folder, manifest | {"leaves": describe(arrays)})


def finish(folder: Place, manifest: dict) -> None:
    """Writes the manifest of a step, whose arrays are there: the last file, without which it is no step.

    It lists the files that a step cannot be read without; copying a step may lose Orbax's empty markers.
    """
    found = sorted(paths.sizes(folder).items())
    needed = {name: size for name, size in found if name == "_CHECKPOINT_METADATA" or name.startswith("state/")}
    files.write(folder / MANIFEST, seal(manifest | {"files": needed}))


def seal(manifest: dict) -> str:
    """The manifest as text, with a checksum of its own."""
    body = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps({"check": zlib.crc32(body.encode()), "manifest": manifest}, sort_keys=True) + "\n"


def read_manifest(folder: Place) -> dict:
    """What a step must hold. Raises Damaged when it is missing or altered, or when a file has another size."""
    path = folder / MANIFEST
    try:
        box = json.loads(path.read_text())
        manifest = box["manifest"]
        if zlib.crc32(json.dumps(manifest, sort_keys=True).encode()) != box["check"]:
            raise ValueError("its checksum is wrong")
        _check_entries(manifest)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the save was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Damaged(f"{path} is not a manifest: {first_line(e)}") from None
    found = paths.sizes(folder)
    for name, size in manifest["files"].items():
        if (has := found.get(name)) != size:
            raise Damaged(f"{folder / name} " + ("is missing" if has is None else f"has {has} bytes, not {size}"))
    return manifest


def _check_entries(manifest: dict) -> None:
    """Raises one of a few errors when a manifest, of another hand perhaps, is not what `seal` was given."""
    kinds = {"step": int, "leaves": dict, "frozen": (dict, str), "source": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its {name!r} is a {type(manifest[name]).__name__}")
    for name, leaf in manifest["leaves"].items():
        jnp.dtype(leaf["dtype"])
        if not all(type(n) is int and n >= 0 for n in leaf["shape"]) or not isinstance(leaf["hash"], str):
            raise ValueError(f"its entry of {name} has no shape and no hash")


def orbax() -> ModuleType:
    """Orbax's v1 interface, without its log: what goes wrong comes as an exception, and that is told in one line."""
    from orbax.checkpoint import v1

    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
    return v1


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def steps(folder: Place) -> list[int]:
    """Steps that look saved, newest first; only `read_manifest` and the digests tell whether they are whole.

    On disk a step gets its name when it is whole; in a store, where nothing can be renamed, its manifest comes last.
    """
    if not folder.is_dir():
        return []
    found = [p.parent for p in folder.glob(f"*/{MANIFEST}")] if paths.remote(folder) else folder.iterdir()
    return sorted((int(p.name) for p in found if STEP.fullmatch(p.name) and p.is_dir()), reverse=True)


def read(folder: Place, abstract: Leaves) -> Leaves:
    """The arrays that `abstract` names: numpy where it holds numpy, else sharded as it says, whatever mesh saved them.

    Raises Damaged. The values are not verified yet: see `verify`.
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
    """Raises Damaged for the first array that is not what was saved."""
    hashes = digests(arrays)
    for name in arrays:
        if hashes[name] != manifest["leaves"][name]["hash"]:
            raise Damaged(f"{name} in {folder / 'state'} is not what was saved: a bit has flipped on disk")


def first_line(error: BaseException) -> str:
    """The cause of an error in one line; Orbax hides it behind others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Saved(NamedTuple):
    """What a run has learned: enough to rebuild its model, once the frozen weights are derived from the config."""

    step: int
    config: dict
    params: dict[str, np.ndarray]  # "policy/layers/attn/wq/a" and so on; adapters only, where only they were trained
    frozen: dict[str, str] | str  # `fingerprints` of the frozen weights it was trained with


def load_params(workdir: str | Path, step: int | None = None, verified: bool = True) -> Saved:
    """The trained parameters of a run folder, in host memory; optimizer state is not read.

    Takes `step`, or the newest one that is whole; the run may still be going on. Raises UserError.
    """
    workdir, problem = paths.parse(workdir), "it holds no checkpoint"
    for at in steps(workdir / "ckpt") if step is None else [step]:
        folder = workdir / "ckpt" / str(at)
        try:
            manifest = read_manifest(folder)
            arrays = read(folder, _wanted(manifest))
            if verified:
                verify(folder, arrays, manifest)
            config = json.loads((workdir / "config.json").read_text())
            params = {name.removeprefix("params/"): x for name, x in arrays.items()}
            return Saved(at, config, params, manifest["frozen"])
        except Damaged as e:
            problem = str(e)
        except (OSError, ValueError, MemoryError) as e:
            raise UserError(first_line(e), str(workdir), "is this a run folder?") from e
    raise UserError(problem, str(workdir), "train it first, or name another step")


def check_base(run: Saved, policy: Params, where: str | Place) -> None:
    """Raises UserError when what a run has not learnt of `policy` is not what it was trained with."""
    frozen = weights.map_named(lambda path, x: None if f"policy/{path}" in run.params else x, policy)
    if isinstance(run.frozen, str):  # one digest for all roles, as runs had before each role had its own
        known = (fingerprint(tree) for tree in ({"policy": frozen}, {"policy": frozen, "ref": policy}))
        same = not run.frozen or run.frozen in known
    else:
        same = run.frozen.get("policy", "") == fingerprint(frozen)
    if not same:
        raise UserError("its adapters were trained on another base than this one", str(where))


def put(run: Saved, policy: Params, where: str | Place) -> Params:
    """`policy` with what a run has learnt in it, in the types and places of its arrays. Raises UserError."""
    learnt = {k.removeprefix("policy/"): v for k, v in run.params.items() if k.startswith("policy/")}
    if strange := learnt.keys() - named(policy).keys():
        raise UserError(f"the run has learnt {min(strange)}, which its config does not have", str(where))

    def like(name: str, x: Array | jax.ShapeDtypeStruct) -> Array:
        value = learnt.get(name)
        if value is None:
            if isinstance(x, jax.ShapeDtypeStruct):
                raise UserError(f"it does not hold {name}", str(where))
            return x
        if value.shape != x.shape:
            raise UserError(f"{name} was saved with shape {value.shape}, the model wants {x.shape}", str(where))
        value = value.astype(x.dtype)
        return jnp.asarray(value) if isinstance(x, jax.core.Tracer) else jax.device_put(value, x.sharding)

    return weights.map_named(like, policy)


def _wanted(manifest: dict) -> dict[str, np.ndarray]:
    """Host arrays to read the parameters into. Raises ValueError for what no run of ours has saved."""
    out = {}
    for name, leaf in manifest["leaves"].items():
        if name.startswith("params/"):
            dtype = jnp.dtype(leaf["dtype"])
            if not plain(name) or not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
                raise ValueError(f"{name!r} of type {dtype} is not a parameter")
            out[name] = np.empty(leaf["shape"], dtype)
    return out
