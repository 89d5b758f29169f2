"""Adapters of PEFT: a folder with adapter_config.json and adapter_model.safetensors, as a Transform. Written by
model/adapters_write.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import paths
from common.errors import UserError
from model import weights
from model.families import _layout as layout
from model.families._layout import Key
from model.io import hf
from model.io.pretrained import families, family
from model.net.kinds import without_columns
from model.peft.dora import DoRA, measure
from model.peft.ia3 import IA3
from model.peft.lora import LoRA, factors, first_match, scale_of
from model.peft.oft import OFT, block_of
from model.peft.prefix import Prefix, with_prefix
from model.peft.prompt import Prompt
from model.weights import Params, Spec, Specs, Transform

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
HEAD = "BTD,VD->BTV"  # a tied table as an unembedding

# Fields of adapter_config.json that say where an adapter came from, or what its tensors show anyway.
HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules", "r",
    "rank_pattern", "fan_in_fan_out", "ensure_weight_tying", "megatron_config", "megatron_core", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_ia3_weights",
    "init_weights", "oft_block_size", "module_dropout", "eps",
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "encoder_hidden_size", "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
# Fields that are computed here; every other one must be unset.
KNOWN = {
    "LORA": {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"},
    "IA3": set(),
    "OFT": {"use_cayley_neumann", "num_cayley_neumann_terms"},
    "PREFIX_TUNING": set(),
    "PROMPT_TUNING": set(),
}
UNSET = (None, False, 0, "none", [], {})
INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base when PEFT loads them


class Folder:
    """A PEFT folder: its config, checked, and its tensors, each of which must be asked for."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        paths.regular(path)
        self.path, self.config, self.used = path, hf.read_json(path / CONFIG), set()
        self.kind = self.config.get("peft_type")
        if self.kind not in KNOWN:
            raise UserError(f"PEFT type {self.kind!r} is not computed here; known: {', '.join(KNOWN)}", str(path))
        for field, value in self.config.items():
            if field not in HARMLESS | KNOWN[self.kind] and value not in UNSET:
                raise UserError(f"{field}={value!r} changes the result and is not computed here", str(path / CONFIG))
        if self.config.get("init_lora_weights", True) not in INITS:
            what = f"init_lora_weights={self.config['init_lora_weights']!r} changes the base itself"
            raise UserError(what, str(path / CONFIG), "save it with path_initial_model_for_weight_conversion")
        try:
            with safe_open(path / TENSORS, framework="np") as file:
                self.tensors = {n: np.asarray(file.get_tensor(n), np.float32) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"not a readable safetensors file ({error})", str(path / TENSORS)) from None
        vectors = {n: x for n, x in self.tensors.items() if n.endswith(".ia3_l")}
        self.inputs = {n for n, x in vectors.items() if x.shape[0] == 1}  # [1, in]; outputs are [out, 1]
        self.tensors |= {n: x.reshape(-1) for n, x in vectors.items()}

    def get(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        """A tensor, None when it is not there. Raises UserError for another shape; None in `shape` is any size."""
        x = self.tensors.get(name)
        if x is not None:
            self.used.add(name)
            if x.ndim != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape)):
                raise UserError(f"{name} has shape {x.shape}, the model wants {shape}", str(self.path / TENSORS))
        return x

    def alpha(self, module: str) -> float:
        """PEFT's lora_alpha of a module: the first pattern that its name ends with."""
        patterns = self.config.get("alpha_pattern") or {}
        try:
            rules = tuple((rf"(.*\.)?({pattern})", value) for pattern, value in patterns.items())
            return float(first_match(rules, module, self.config.get("lora_alpha", 8)))
        except (re.error, TypeError, ValueError) as error:
            raise UserError(f"alpha_pattern: {error}", str(self.path / CONFIG)) from None

    def keys(self) -> dict[str, Key]:
        """The names of the first family that knows every module of the tensors."""
        found = {re.sub(r"\.\d+\.", ".{}.", n).removeprefix(ROOT) for n in self.tensors if n.startswith(ROOT)}
        for keys in (family(name).KEYS for name in families()):
            known = tuple(k.name.removesuffix("weight") for k in keys.values() if k.name.endswith(".weight"))
            if all(name.startswith(known) for name in found):
                return keys
        raise UserError("its modules are those of no family computed here", str(self.path / TENSORS))


def read(path: str | Path) -> Transform:
    """A Transform that puts the adapter of a PEFT folder on its base model.

    Raises UserError for what would change the result and is not computed here, and for tensors that do not fit.
    """
    folder = Folder(Path(path).expanduser())
    keys = folder.keys()

    def transform(params: Params, specs: Specs, key: jax.Array) -> Params:
        if others := without_columns(specs["layers"]):
            raise UserError(f"PEFT folders of models with {others[0]} layers are not read here", str(folder.path))
        sizes = {}
        for spec in jax.tree.leaves(specs, is_leaf=weights.is_spec):
            sizes |= zip(weights.operands(spec.eqn)[1], spec.shape[spec.stacked :]) if spec.eqn else {}
        if folder.kind in ("PREFIX_TUNING", "PROMPT_TUNING"):
            out = _virtual(folder, params, specs)
        else:
            out = weights.replace(params, specs, lambda n, w, s: _leaf(folder, keys, sizes, specs, n, w, s))
        if strange := sorted(folder.tensors.keys() - folder.used):
            raise UserError(f"{strange[0]} has no place in this model", str(folder.path / TENSORS))
        return out

    return transform


def _virtual(folder: Folder, params: Params, specs: Specs) -> Params:
    layers, embed, heads, dim = specs["layers"]["attn"]["wk"].shape
    prompt = folder.kind == "PROMPT_TUNING"
    flat = folder.get("prompt_embeddings", (None, embed if prompt else layers * 2 * heads * dim))
    if flat is None:
        raise UserError("holds no prompt_embeddings", str(folder.path / TENSORS))
    if prompt:
        return {**params, "prompt": Prompt(jnp.asarray(flat))}
    k, v = flat.reshape(-1, layers, 2, heads, dim).transpose(2, 1, 0, 3, 4)  # [L,P,K,H] each
    return with_prefix(params, Prefix(jnp.asarray(k), jnp.asarray(v)))


def _leaf(folder: Folder, keys: dict, sizes: dict, specs: Specs, path: str, base: Any, spec: Spec | None) -> Any:
    """A parameter with its adapter, when the folder has one for it."""
    if spec is None or not spec.eqn or path not in keys:
        return base
    if not spec.stacked and folder.kind != "LORA":
        return base
    if not spec.stacked:
        own = _read(folder, keys[path], sizes, _names(keys[path], spec, ".base_layer.weight"))[0]
        if own is not None and not weights.is_weight(base):
            base = jnp.asarray(own, base.dtype)  # PEFT keeps a table beside its adapter, and loads it
    if path != "embed/table":
        return READERS[folder.kind](folder, keys[path], sizes, specs, path, base, spec)
    leaf = _lora(folder, keys[path], sizes, specs, path, base, spec)
    if "unembed" in specs:
        return leaf
    key = Key(keys["unembed/table"].name, "VD->VD")
    folder.get(ROOT + "lm_head.base_layer.weight", spec.shape)  # the same table
    head = _lora(folder, key, sizes, specs, path, base, spec.replace(eqn=HEAD))
    if head is base:
        return leaf if leaf is base else leaf.replace(used="lookup")
    if leaf is base:
        return head.replace(used="head")
    return leaf if _tied(folder, keys) else head.replace(used="head", base=leaf.replace(used="lookup"))


def _tied(folder: Folder, keys: dict) -> bool:
    """Whether the adapters of a tied table and of the head are one, as PEFT writes it with ensure_weight_tying."""
    embed, head = (keys[path].name.removesuffix(".weight") for path in ("embed/table", "unembed/table"))
    pairs = ((".lora_embedding_A", ".lora_B.weight"), (".lora_embedding_B", ".lora_A.weight"))
    same = (np.array_equal(folder.tensors[ROOT + embed + a].T, folder.tensors[ROOT + head + b]) for a, b in pairs)
    return not folder.config.get("use_dora") and folder.alpha(embed) == folder.alpha(head) and all(same)


def groups(key: Key, eqn: str) -> tuple[str, str]:
    """The merged letters that a checkpoint's matrix contracts, and those it produces: ("D", "NH"); "3NH" of three."""
    contracted = weights.split(eqn)[1]
    axes = layout.parse(key.layout)[0]
    inside = next(i for i, letters in enumerate(axes) if letters.lstrip("0123456789") == contracted)
    return axes[inside], axes[1 - inside]


def factor_keys(key: Key, eqn: str) -> tuple[Key, Key]:
    """How lora_A [R, in] and lora_B [out, R] lie against ours."""
    (a, b), (inside, outside) = factors(eqn), groups(key, eqn)
    return Key(key.name, f"R({inside})->{a}"), Key(key.name, f"({outside})R->{b}", key.part)


def _names(key: Key, spec: Spec, suffix: str) -> list[str]:
    """Of a tensor in every layer, or outside the layers."""
    module = ROOT + key.name.removesuffix(".weight")
    return [module.format(i) + suffix for i in (range(spec.shape[0]) if spec.stacked else [None])]


def _read(folder: Folder, key: Key, sizes: dict, names: list[str], wild: str = "") -> list[np.ndarray | None]:
    """A tensor of each layer in our orientation; None where a layer has none. The size of the letter `wild` is free."""
    axes, ours = layout.parse(key.layout)
    shape = tuple(None if a == wild else n for a, n in zip(axes, layout.shape(key, sizes | {wild: 1})))
    found = [folder.get(name, shape) for name in names]
    own = lambda x: sizes | {wild: x.shape[axes.index(wild)]} if wild else sizes
    whole = (slice(None),) * len(ours)
    return [None if x is None else layout.read(key, x.__getitem__, own(x), whole) for x in found]


def _stack(found: list[np.ndarray], spec: Spec) -> jax.Array:
    return jnp.asarray(np.stack(found) if spec.stacked else found[0])


def _vectors(folder: Folder, key: Key, sizes: dict, spec: Spec, suffix: str, group: str) -> jax.Array | None:
    """Flat vectors [stack..., features] over a group of letters, ones where a layer has none; None if none has one."""
    letters = group.lstrip("0123456789")
    found = _read(folder, Key(key.name, f"({group})->{letters}", key.part), sizes, _names(key, spec, suffix))
    if all(x is None for x in found):
        return None
    ones = np.ones(layout.size(letters, sizes), np.float32)
    return _stack([ones if x is None else x.reshape(-1) for x in found], spec)


def _lora(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Any, spec: Spec) -> Any:
    c, embedding = folder.config, path == "embed/table" and spec.eqn != HEAD
    a_key, b_key = factor_keys(key, spec.eqn)
    suffixes = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
    a, b = (_read(folder, k, sizes, _names(key, spec, s), "R") for k, s in zip((a_key, b_key), suffixes))
    if any((x is None) != (y is None) for x, y in zip(a, b)):
        raise UserError(f"{key.name}: one of lora_A and lora_B is missing", str(folder.path / TENSORS))
    if all(x is None for x in a):
        return base
    # Layers may differ in rank and alpha: a smaller rank is padded with zeros, another scale goes into B.
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
    if not c.get("use_dora"):
        return leaf
    suffix = ".lora_magnitude_vector"
    if missing := [name for name in _names(key, spec, suffix) if name not in folder.tensors]:
        raise UserError(f"holds no {missing[0]}", str(folder.path / TENSORS))
    magnitude = _vectors(folder, key, sizes, spec, suffix, groups(key, spec.eqn)[1])
    return measure(path, leaf.replace(magnitude=magnitude), spec)


def _ia3(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Any, spec: Spec) -> Any:
    inputs = bool(folder.inputs & set(_names(key, spec, ".ia3_l")))
    group = groups(key, spec.eqn)[not inputs]
    scale = _vectors(folder, key, sizes, spec, ".ia3_l", group)
    if scale is None:
        return base
    if not inputs and has_bias(specs, path):
        raise UserError(f"IA3 in PEFT rescales the bias of {path} too, which is not computed here", str(folder.path))
    return IA3(base, scale, group.lstrip("0123456789"))


def has_bias(specs: Specs, path: str) -> bool:
    *parents, name = path.split("/")
    for parent in parents:
        specs = specs[parent]
    return "b" + name.removeprefix("w") in specs


def _oft(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Any, spec: Spec) -> Any:
    found = [folder.get(n, (None, None)) for n in _names(key, spec, ".oft_R.weight")]
    if all(q is None for q in found):
        return base
    q = next(q for q in found if q is not None)
    letters = weights.split(spec.eqn)[1]
    b = block_of(q.shape[1])
    if any(x is not None and x.shape != (layout.size(letters, sizes) // b, b * (b - 1) // 2) for x in found):
        raise UserError(f"{key.name}: the blocks of oft_R do not cover its inputs", str(folder.path / TENSORS))
    terms = folder.config.get("num_cayley_neumann_terms", 5) if folder.config.get("use_cayley_neumann", True) else 0
    if terms not in range(100):
        raise UserError(f"num_cayley_neumann_terms={terms!r} is no number of terms", str(folder.path / CONFIG))
    return OFT(base, _stack([np.zeros_like(q) if x is None else x for x in found], spec), letters, terms)


READERS: dict[str, Callable] = {"LORA": _lora, "IA3": _ia3, "OFT": _oft}
