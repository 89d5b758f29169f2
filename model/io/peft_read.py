"""Reads a PEFT folder and returns a Transform that adds its adapter to the base model's parameters.

As in PEFT, adapter_config.json determines which modules have adapters. Tensors of other modules are ignored and listed
in one line of the log. model/io/peft_write.py writes such folders.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError, reading
from model import weights
from model.config import in_layers
from model.families import _layout as layout
from model.families._layout import Key
from model.io.peft_folder import CONFIG, MAGNITUDE, MERGED, ROOT, STARTS, TENSORS, TOKENS, VIRTUAL, Folder, ends
from model.io.pretrained import IGNORED, report
from model.net.kinds import without_columns
from model.peft.dora import DoRA, measure
from model.peft.ia3 import IA3
from model.peft.lora import LoRA, factors, matrix, scale_of, truncate
from model.peft.oft import OFT, block_of
from model.peft.prefix import Prefix, with_prefix
from model.peft.prompt import Prompt
from model.weights import Params, Spec, Specs, Transform, Weight

Stored = Array | Weight  # a parameter, with or without adapters
HEAD = "BTD,VD->BTV"  # the einsum equation of a tied embedding table when it is used as the output head


def read(path: str | Path, strict: bool = False) -> Transform:
    """Returns a Transform that adds the adapter in a PEFT folder to its base model.

    Raises UserError for unsupported settings that would change the result, and for tensors that do not fit the model.
    If `strict`, also raises UserError for unused tensors.
    """
    path = Path(path).expanduser()
    with reading(path):
        folder = Folder(path)
        keys = folder.keys()

    @reading(path)
    def transform(params: Params, specs: Specs, key: jax.Array) -> Params:
        if others := without_columns(specs["layers"]):
            raise UserError(f"PEFT folders of models with {others[0]} layers are not supported", str(folder.path))
        sizes = {}
        for spec in jax.tree.leaves(specs, is_leaf=weights.is_spec):
            sizes |= zip(weights.operands(spec.eqn)[1], spec.shape[spec.stacked :]) if spec.eqn else {}
        if "position" in specs:
            sizes["P"] = specs["position"]["table"].shape[0]
        if folder.kind in VIRTUAL:
            out = _virtual(folder, params, specs)
        else:
            out = weights.replace(params, specs, lambda n, w, s: _leaf(folder, keys, sizes, specs, n, w, s))
        if strange := sorted(n for n in folder.tensors.keys() - folder.used if not IGNORED.fullmatch(n)):
            raise UserError(f"this model has no parameter for {strange[0]}", str(folder.path / TENSORS))
        report("the adapter's config does not name the modules of", folder.unused, str(folder.path), strict)
        return out

    return transform


def _virtual(folder: Folder, params: Params, specs: Specs) -> Params:
    layers, embed, heads, dim = specs["layers"]["attn"]["wk"].shape
    prompt = folder.kind != "PREFIX_TUNING"
    flat = folder.get("prompt_embeddings", (None, embed if prompt else layers * 2 * heads * dim))
    if flat is None:
        raise UserError("prompt_embeddings is missing", str(folder.path / TENSORS))
    if prompt:
        return {**params, "prompt": Prompt(jnp.asarray(flat))}
    k, v = flat.reshape(-1, layers, 2, heads, dim).transpose(2, 1, 0, 3, 4)  # [L,P,K,H] each
    return with_prefix(params, Prefix(jnp.asarray(k), jnp.asarray(v)))


def _leaf(folder: Folder, keys: dict, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec | None) -> Stored:
    """Applies to one parameter everything that the folder stores for it: replacement tensors and adapters."""
    if spec is None or path not in keys:
        return base
    if path == "embed/table" and "unembed" not in specs:
        return _tied_table(folder, keys, sizes, specs, base, spec)
    base = _own(folder, keys[path], sizes, path, base, spec)
    if path in ("embed/table", "unembed/table"):
        base = _tokens(folder, keys[path], base, spec)
    if not spec.eqn:
        return _scaled_bias(folder, keys, sizes, specs, path, base) if folder.kind == "IA3" else base
    if not spec.stacked and folder.kind != "LORA":
        return base
    return READERS[folder.kind](folder, keys[path], sizes, specs, path, base, spec)


def _own(folder: Folder, key: Key, sizes: dict, path: str, base: Stored, spec: Spec) -> Stored:
    """Replaces a parameter by the full tensors that the folder stores for it, if any.

    PEFT stores full tensors for `modules_to_save`, for trained biases and for embedding tables that have adapters.
    """
    module, _, last = key.name.rpartition(".")
    for inner in ("", ".base_layer"):
        name = f"{ROOT}{module}{inner}.{last}"
        layers = range(spec.shape[0]) if in_layers(path) else [None]
        for i, x in zip(layers, _read(folder, key, sizes, [name.format(i) for i in layers])):
            if x is not None:
                base = weights.dense_of(base, spec)
                base = jnp.asarray(x, base.dtype) if i is None else base.at[i].set(x)
    return base


def _tokens(folder: Folder, key: Key, base: Stored, spec: Spec) -> Stored:
    """Replaces the embeddings of tokens in `trainable_token_indices`, in a table [V, D] or a head [D, V]."""
    module = key.name.removesuffix(".weight")
    table = key.layout == "VD->VD"
    rows = folder.get(ROOT + module + TOKENS, (None, spec.shape[table]))
    if rows is None:
        return base
    said = folder.config.get("trainable_token_indices")
    ids = next((v for k, v in said.items() if ends(module, [k])), None) if isinstance(said, dict) else said
    size = spec.shape[not table]
    if not isinstance(ids, list) or len(ids) != len(rows) or not all(type(i) is int and 0 <= i < size for i in ids):
        raise UserError(f"trainable_token_indices does not list the {len(rows)} tokens of {module}", str(folder.path))
    base = weights.dense_of(base, spec)
    return base.at[jnp.asarray(ids)].set(rows) if table else base.at[:, jnp.asarray(ids)].set(rows.T)


def _tied_table(folder: Folder, keys: dict, sizes: dict, specs: Specs, base: Stored, spec: Spec) -> Stored:
    """Applies adapters and trained copies to a tied embedding table, which is used for lookup and as the output head.

    In PEFT, an adapter or a trained copy changes only one of these uses, unless it is stored for both.
    """
    uses = {"lookup": (keys["embed/table"], spec)}
    uses["head"] = Key(keys["unembed/table"].name, "VD->VD"), spec.replace(eqn=HEAD)
    copies = {}
    for use, (key, _) in uses.items():
        module = key.name.removesuffix(".weight")
        copy = folder.get(ROOT + key.name, spec.shape)
        if copy is not None and ends(module, folder.config.get("modules_to_save")):
            copies[use], copy = copy, None
        kept = folder.get(f"{ROOT}{module}.base_layer.weight", spec.shape)
        if (own := kept if copy is None else copy) is not None:
            base = jnp.asarray(own, weights.dense_of(base, spec).dtype)
    if (len(copies) == 2 and np.array_equal(*copies.values())) or (copies and folder.config.get("ensure_weight_tying")):
        base, copies = jnp.asarray(next(iter(copies.values())), weights.dense_of(base, spec).dtype), {}
    base = _tokens(folder, uses["lookup"][0], base, spec)
    for use, copy in copies.items():
        base = _change(base, copy, uses[use][1], use)
    leaf, head = (_lora(folder, k, sizes, specs, "embed/table", base, s) for k, s in uses.values())
    if head is base:
        return leaf if leaf is base else leaf.replace(used="lookup")
    if leaf is base:
        return head.replace(used="head")
    return leaf if _tied(folder, keys) else head.replace(used="head", base=leaf.replace(used="lookup"))


def _change(base: Stored, copy: np.ndarray, spec: Spec, use: str) -> LoRA:
    """Returns a table [V, D] with the values of `copy` for `use` ("lookup" or "head"), and with those of `base` for the
    other use.

    A full-rank LoRA, which is active only in this use, adds the difference.
    """
    change, one = copy - weights.dense_of(weights.base(base), spec), jnp.eye(copy.shape[1])
    a, b = (one, change.T) if use == "head" else (change, one)
    return LoRA(base, a, b, spec.eqn, 1.0, used=use)


def _tied(folder: Folder, keys: dict) -> bool:
    """Returns whether a tied table has the same adapter for lookup and head, as with PEFT's ensure_weight_tying."""
    embed, head = (keys[path].name.removesuffix(".weight") for path in ("embed/table", "unembed/table"))
    pairs = ((".lora_embedding_A", ".lora_B.weight"), (".lora_embedding_B", ".lora_A.weight"))
    same = (np.array_equal(folder.tensors[ROOT + embed + a].T, folder.tensors[ROOT + head + b]) for a, b in pairs)
    return not folder.config.get("use_dora") and folder.alpha(embed) == folder.alpha(head) and all(same)


def groups(key: Key, eqn: str) -> tuple[str, str]:
    """Returns the letters for the two axes of a checkpoint matrix, as (contracted axis, output axis).

    For example, they are ("D", "NH") for a query matrix and ("D", "3NH") for a fused qkv matrix.
    """
    contracted = weights.split(eqn)[1]
    axes = layout.parse(key.layout)[0]
    inside = next(i for i, letters in enumerate(axes) if letters.lstrip("0123456789") == contracted)
    return axes[inside], axes[1 - inside]


def factor_keys(key: Key, eqn: str) -> tuple[Key, Key]:
    """Returns Keys with the layouts of the tensors lora_A [R, in] and lora_B [out, R]."""
    (a, b), (inside, outside) = factors(eqn), groups(key, eqn)
    return Key(key.name, f"R({inside})->{a}"), Key(key.name, f"({outside})R->{b}", key.part)


def _names(key: Key, spec: Spec, suffix: str) -> list[str]:
    """Returns the names of a tensor: one per layer, or a single name if it is outside the layers."""
    module = ROOT + key.name.removesuffix(".weight")
    return [module.format(i) + suffix for i in (range(spec.shape[0]) if spec.stacked else [None])]


def _read(folder: Folder, key: Key, sizes: dict, names: list[str], wild: str = "") -> list[np.ndarray | None]:
    """Reads one tensor per layer, and converts it to our layout. Returns None for layers that lack the tensor. The axis
    `wild` may have any size."""
    axes, ours = layout.parse(key.layout)
    shape = tuple(None if a == wild else n for a, n in zip(axes, layout.shape(key, sizes | {wild: 1})))
    found = [folder.get(name, shape) for name in names]
    own = lambda x: sizes | {wild: x.shape[axes.index(wild)]} if wild else sizes
    whole = (slice(None),) * len(ours)
    return [None if x is None else layout.read(key, x.__getitem__, own(x), whole) for x in found]


def _stack(found: list[np.ndarray], spec: Spec) -> jax.Array:
    return jnp.asarray(np.stack(found) if spec.stacked else found[0])


def _vectors(folder: Folder, key: Key, sizes: dict, spec: Spec, suffix: str, group: str) -> jax.Array | None:
    """Reads one vector per layer and stacks the vectors. `group` contains the letters of the axes that are merged in a
    vector.

    A layer that lacks the vector gets a vector of ones. Returns None if no layer has a vector.
    """
    letters = group.lstrip("0123456789")
    found = _read(folder, Key(key.name, f"({group})->{letters}", key.part), sizes, _names(key, spec, suffix))
    if all(x is None for x in found):
        return None
    ones = np.ones(layout.size(letters, sizes), np.float32)
    return _stack([ones if x is None else x.reshape(-1) for x in found], spec)


def _lora(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec) -> Stored:
    c, embedding = folder.config, path == "embed/table" and spec.eqn != HEAD
    a_key, b_key = factor_keys(key, spec.eqn)
    suffixes = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
    a, b = (_read(folder, k, sizes, _names(key, spec, s), "R") for k, s in zip((a_key, b_key), suffixes))
    if any((x is None) != (y is None) for x, y in zip(a, b)):
        raise UserError(f"{key.name}: one of lora_A and lora_B is missing", str(folder.path / TENSORS))
    if all(x is None for x in a):
        return base
    # Layers may differ in rank and alpha, but the stacked parameter has only one rank and one scale. So smaller ranks
    # are padded with zeros, and each layer's B is multiplied by the ratio of the layer's scale to the common scale.
    modules = [n.removeprefix(ROOT) for n in _names(key, spec, "")]
    ranks = [0 if x is None else x.shape[-1] for x in a]
    at = lambda i: scale_of(folder.alpha(modules[i]), ranks[i], bool(c.get("use_rslora")))
    first = ranks.index(max(ranks))
    scale, shapes = at(first), (a[first].shape, b[first].shape)
    axis = len(weights.split(spec.eqn)[0])
    for i, r in enumerate(ranks):
        whole = [np.zeros(shape, np.float32) for shape in shapes]
        if r:
            whole[0][..., :r] = a[i]
            whole[1][(slice(None),) * axis + (slice(r),)] = b[i] if at(i) == scale else b[i] * (at(i) / scale)
        a[i], b[i] = whole
    leaf = DoRA if c.get("use_dora") else LoRA
    leaf = leaf(base, _stack(a, spec), _stack(b, spec), spec.eqn, scale, dropout=float(c.get("lora_dropout") or 0))
    if folder.init in STARTS:
        shares = [at(i) / (scale or 1) if r else 0.0 for i, r in enumerate(ranks)]
        start = _start(folder, key, path, leaf, spec, ranks, shares)
        less = LoRA(base, *start, spec.eqn, -scale)
        leaf = leaf.replace(base=less.dense(spec)) if c.get("use_dora") else leaf.replace(start=start)
    return _measured(folder, key, sizes, path, leaf, spec, ranks) if c.get("use_dora") else leaf


def _start(
    folder: Folder, key: Key, path: str, leaf: LoRA, spec: Spec, ranks: list[int], shares: list[float]
) -> tuple[Array, Array]:
    """Computes the initial A and B from the base weight W. PEFT subtracts their product from W.

    For PiSSA, A and B consist of the singular vectors of W with the largest singular values. For OLoRA (Buyukakyuz
    2024, arXiv 2406.01775), they are truncated factors of the QR decomposition W^T = Q R. `shares` has the scale of
    each layer, divided by the scale of `leaf`.
    """
    turned = folder.init == "olora" and folder.config.get("fan_in_fan_out")
    if path == "embed/table" or any(c.isdigit() for c in key.layout) or turned or leaf.scale <= 0:
        what = f"init_lora_weights={folder.init!r} is not supported for {key.name}"
        raise UserError(what, str(folder.path / CONFIG), MERGED)
    base, rank = weights.dense_of(leaf.base, spec).astype(jnp.float32), leaf.a.shape[-1]
    if folder.init == "pissa":
        a, b, _ = truncate(base, spec, rank)
        a, b = a / leaf.scale**0.5, b / leaf.scale**0.5
    else:
        q, r = jnp.linalg.qr(jnp.swapaxes(matrix(base, spec), -1, -2))  # of W^T [..., output, contracted]
        a, b = (jnp.swapaxes(x, -1, -2) for x in (r[..., :rank, :], q[..., :rank]))
        share = jnp.asarray(shares).reshape(-1, *[1] * (b.ndim - 1)) if spec.stacked else shares[0]
        a, b = a.reshape(leaf.a.shape), (b * share).reshape(leaf.b.shape)
    kept = jnp.arange(rank) < jnp.asarray(ranks if spec.stacked else ranks[0])[..., None]  # [stack..., R]
    return a * kept.reshape(*kept.shape[:-1], *[1] * (a.ndim - kept.ndim), rank), b


def _measured(folder: Folder, key: Key, sizes: dict, path: str, leaf: DoRA, spec: Spec, ranks: list[int]) -> DoRA:
    """Reads the magnitudes of a DoRA. In layers without an adapter, the magnitudes are the norms of the base weight."""
    names, group = _names(key, spec, MAGNITUDE), groups(key, spec.eqn)[1]
    if missing := [name for name, rank in zip(names, ranks) if rank and name not in folder.tensors]:
        raise UserError(f"{missing[0]} is missing", str(folder.path / TENSORS))
    found = _read(folder, Key(key.name, f"({group})->{group.lstrip('0123456789')}", key.part), sizes, names)
    leaf = measure(path, leaf, spec)
    magnitude = leaf.magnitude
    for i, x in enumerate(found):
        if x is not None:
            magnitude = magnitude.at[i].set(x.reshape(-1)) if spec.stacked else jnp.asarray(x.reshape(-1))
    return leaf.replace(magnitude=magnitude)


def _ia3(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec) -> Stored:
    inputs = bool(folder.inputs & set(_names(key, spec, ".ia3_l")))
    group = groups(key, spec.eqn)[not inputs]
    scale = _vectors(folder, key, sizes, spec, ".ia3_l", group)
    if scale is None:
        return base
    return IA3(base, scale, group.lstrip("0123456789"))


def _scaled_bias(folder: Folder, keys: dict, sizes: dict, specs: Specs, path: str, base: Stored) -> Stored:
    """Rescales a bias, because PEFT's IA3 rescales the whole output of a module, including its bias."""
    parent, _, name = path.rpartition("/")
    weight = next((p for p in (f"{parent}/w{name[1:]}", f"{parent}/{name[1:]}") if p in keys), None)
    spec = weight and _spec(specs, weight)
    if not spec or not spec.stacked or folder.inputs & set(_names(keys[weight], spec, ".ia3_l")):
        return base
    scale = _vectors(folder, keys[weight], sizes, spec, ".ia3_l", groups(keys[weight], spec.eqn)[1])
    return base if scale is None else base * scale.reshape(base.shape).astype(base.dtype)


def _spec(specs: Specs, path: str) -> Spec | None:
    for part in path.split("/"):
        specs = specs.get(part, {})
    return specs or None


def has_bias(specs: Specs, path: str) -> bool:
    parent, _, name = path.rpartition("/")
    return "b" + name.removeprefix("w") in weights.at(specs, parent)


def _oft(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec) -> Stored:
    found = [folder.get(n, (None, None)) for n in _names(key, spec, ".oft_R.weight")]
    if all(q is None for q in found):
        return base
    q = next(q for q in found if q is not None)
    letters = weights.split(spec.eqn)[1]
    b = block_of(q.shape[1])
    if any(x is not None and x.shape != (layout.size(letters, sizes) // b, b * (b - 1) // 2) for x in found):
        raise UserError(f"{key.name}: the blocks of oft_R do not match its input size", str(folder.path / TENSORS))
    terms = folder.config.get("num_cayley_neumann_terms", 5) if folder.config.get("use_cayley_neumann", True) else 0
    return OFT(base, _stack([np.zeros_like(q) if x is None else x for x in found], spec), letters, terms)


READERS: dict[str, Callable] = {"LORA": _lora, "IA3": _ia3, "OFT": _oft}
