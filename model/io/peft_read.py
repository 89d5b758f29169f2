"""Adapters of PEFT: a folder with adapter_config.json and adapter_model.safetensors, as a Transform.

What they do is what PEFT does with them: its config says which modules they are for, and what the file holds for others
stays unused, which is said in a line. Written by model/io/peft_write.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common import paths, regexes
from common.errors import UserError
from model import weights
from model.config import in_layers
from model.families import _layout as layout
from model.families._layout import Key
from model.io import hf
from model.io.pretrained import IGNORED, families, family, report
from model.net.kinds import without_columns
from model.peft.dora import DoRA, measure
from model.peft.ia3 import IA3
from model.peft.lora import LoRA, factors, scale_of
from model.peft.oft import OFT, block_of
from model.peft.prefix import Prefix, with_prefix
from model.peft.prompt import Prompt
from model.weights import Params, Spec, Specs, Transform, Weight

TABLES = ["embed_tokens", "wte", "lm_head"]
MAGNITUDE = ".lora_magnitude_vector"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Stored = Array | Weight  # what stands at a parameter
ROOT = "base_model.model."
HEAD = "BTD,VD->BTV"  # a tied table as an unembedding

# Fields of adapter_config.json that say where an adapter came from, or what its tensors show anyway.
HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "feedforward_modules", "r", "rank_pattern", "fan_in_fan_out", "ensure_weight_tying", "megatron_config",
    "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "init_ia3_weights", "init_weights", "oft_block_size", "module_dropout", "eps",
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs",
}  # fmt: skip
# Fields that are computed here; every other one must be unset.
WRAPS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}
LORA = {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"}
KNOWN = {
    "LORA": WRAPS | LORA | {"trainable_token_indices"},
    "IA3": WRAPS,
    "OFT": WRAPS | {"use_cayley_neumann", "num_cayley_neumann_terms"},
    "PREFIX_TUNING": set(),
    "PROMPT_TUNING": set(),
    "P_TUNING": set(),
}
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
TOKENS = ".token_adapter.trainable_tokens_delta"
PICKLE, CONVERT = (
    "adapter_model.bin",
    (
        "python -c \"import torch; from safetensors.torch import save_file; p = '{}/adapter_model'; save_file({{k: "
        "v.contiguous() for k, v in torch.load(p + '.bin', weights_only=True).items()}}, p + '.safetensors')\""
    ),
)
UNSET = (None, False, 0, "none", [], {})
INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base when PEFT loads them


class Folder:
    """A PEFT folder: its config, checked, and its tensors under the names of a causal model, each to be asked for."""

    def __init__(self, path: Path):
        paths.regular(path)
        self.path, self.config, self.used = path, hf.read_json(path / CONFIG), set()
        self.kind = self.config.get("peft_type")
        self._check()
        self._patterns: dict[str, re.Pattern] = {}
        tensors = {name.removesuffix(".weight") if MAGNITUDE in name else name: x for name, x in self._read().items()}
        before = {m[1] for n in tensors if (m := hf.FIRST.fullmatch(n.removeprefix(ROOT)))}
        self.body = next((b for b in hf.BODIES if b in before), "model.")  # of a multimodal base perhaps
        self.unused = sorted(n for n in tensors if self.kind not in VIRTUAL and not self._wanted(n))
        self.tensors = {self._renamed(n): x for n, x in tensors.items() if n not in self.unused}
        vectors = {n: x for n, x in self.tensors.items() if n.endswith(".ia3_l")}
        self.inputs = {n for n, x in vectors.items() if x.shape[0] == 1}  # [1, in]; outputs are [out, 1]
        self.tensors |= {n: x.reshape(-1) for n, x in vectors.items()}

    def _check(self) -> None:
        """Raises UserError for a config that asks for what is not computed here."""
        path = str(self.path / CONFIG)
        if self.kind not in KNOWN:
            known = ", ".join(KNOWN)
            raise UserError(f"PEFT type {self.kind!r} is not computed here; known: {known}", str(self.path))
        for field, value in self.config.items():
            if field not in HARMLESS | KNOWN[self.kind] and value not in UNSET:
                raise UserError(f"{field}={value!r} changes the result and is not computed here", path)
        if self.config.get("init_lora_weights", True) not in INITS:
            what = f"init_lora_weights={self.config['init_lora_weights']!r} changes the base itself"
            raise UserError(what, path, "save it with path_initial_model_for_weight_conversion")
        if self.config.get("bias", "none") not in ("none", "all", "lora_only", "oft_only"):
            raise UserError(f"bias={self.config['bias']!r} is no choice of PEFT", path)

    def _read(self) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError, safe_open

        path = self.path / TENSORS
        if not path.exists() and (self.path / PICKLE).exists():
            what, fix = "holds a pickle only, which can run code when opened", CONVERT.format(self.path)
            raise UserError(what, str(self.path), f"if you trust it: {fix}")
        try:
            with safe_open(path, framework="np") as file:
                return {n: np.asarray(file.get_tensor(n), np.float32) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError) as error:
            fix = "git lfs pull" if path.exists() and hf.is_pointer(path) else ""
            raise UserError(f"not a readable safetensors file ({error})", str(path), fix) from None

    def _renamed(self, name: str) -> str:
        """The name in a causal model alone of a tensor in the text part of another."""
        inner = name.removeprefix(ROOT)
        if self.body in ("model.", "transformer.") or not inner.startswith(self.body):
            head = inner.startswith("lm_head.") or not re.match(r"(.*\.)?lm_head\.", inner)
            return name if head else ROOT + inner[inner.index("lm_head.") :]
        return f"{ROOT}model.{inner.removeprefix(self.body)}"

    def _wanted(self, name: str) -> bool:
        """Whether PEFT has a place for a tensor: in an adapter of a module that the config names, or in a copy."""
        module = re.sub(
            r"\.(lora_|ia3_l|oft_R|token_adapter|base_layer).*|\.(weight|bias)$", "", name.removeprefix(ROOT)
        )
        adapter = re.search(r"\.(lora_|ia3_l|oft_R)", name)
        if not adapter:
            return True
        tables = TABLES if self.config.get("ensure_weight_tying") and _ends(module, TABLES) else []
        return self.targets(module) or any(map(self.targets, tables))  # PEFT adds the twin of a tied table itself

    def targets(self, module: str) -> bool:
        """Whether the config names a module, as PEFT reads it."""
        names, without = self.config.get("target_modules"), self.config.get("exclude_modules")
        copies = self.config.get("modules_to_save") or []
        if any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in copies):
            return False
        if without and (self._match(without, module) if isinstance(without, str) else _ends(module, without)):
            return False
        if not names:
            return True
        if isinstance(names, str):
            linear = not _ends(module, [*TABLES, "wpe"])
            return linear if names.lower() == "all-linear" else bool(self._match(names, module))
        return module in names or (_ends(module, names) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        """Whether a module lies in one of `layers_to_transform`, if the config has them."""
        chosen, patterns = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        if chosen is None or chosen == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
        found = (self._match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\..*", module) for p in patterns)
        match = next((m for m in found if m), None)
        return bool(match) and int(match["idx"]) in ([chosen] if isinstance(chosen, int) else chosen)

    def _match(self, pattern: str, text: str) -> re.Match | None:
        if pattern not in self._patterns:
            self._patterns[pattern] = regexes.bounded(pattern, str(self.path / CONFIG))
        return self._patterns[pattern].fullmatch(text)

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
        module = self.body + module.removeprefix("model.") if self.body != "transformer." else module
        try:
            found = (value for p, value in patterns.items() if self._match(rf"(.*\.)?({p})", module))
            return float(next(found, self.config.get("lora_alpha", 8)))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"alpha_pattern: {error}", str(self.path / CONFIG)) from None

    def keys(self) -> dict[str, Key]:
        """The names of the first family that knows every module of the tensors."""
        found = {re.sub(r"\.\d+\.", ".{}.", n).removeprefix(ROOT) for n in self.tensors if n.startswith(ROOT)}
        for keys in (family(name).KEYS for name in families()):
            known = tuple(k.name.removesuffix("weight") for k in keys.values() if k.name.endswith(".weight"))
            if all(name.startswith(known) for name in found):
                return keys
        raise UserError("its modules are those of no family computed here", str(self.path / TENSORS))


def _ends(module: str, names: object) -> bool:
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)


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
        if "position" in specs:
            sizes["P"] = specs["position"]["table"].shape[0]
        if folder.kind in VIRTUAL:
            out = _virtual(folder, params, specs)
        else:
            out = weights.replace(params, specs, lambda n, w, s: _leaf(folder, keys, sizes, specs, n, w, s))
        if strange := sorted(n for n in folder.tensors.keys() - folder.used if not IGNORED.fullmatch(n)):
            raise UserError(f"{strange[0]} has no place in this model", str(folder.path / TENSORS))
        report("the adapter's config does not name the modules of", folder.unused, str(folder.path))
        return out

    return transform


def _virtual(folder: Folder, params: Params, specs: Specs) -> Params:
    layers, embed, heads, dim = specs["layers"]["attn"]["wk"].shape
    prompt = folder.kind != "PREFIX_TUNING"
    flat = folder.get("prompt_embeddings", (None, embed if prompt else layers * 2 * heads * dim))
    if flat is None:
        raise UserError("holds no prompt_embeddings", str(folder.path / TENSORS))
    if prompt:
        return {**params, "prompt": Prompt(jnp.asarray(flat))}
    k, v = flat.reshape(-1, layers, 2, heads, dim).transpose(2, 1, 0, 3, 4)  # [L,P,K,H] each
    return with_prefix(params, Prefix(jnp.asarray(k), jnp.asarray(v)))


def _leaf(folder: Folder, keys: dict, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec | None) -> Stored:
    """A parameter with what the folder has for it."""
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
    """A parameter with what the folder holds of it whole: copies of `modules_to_save`, trained biases, tables that PEFT
    keeps beside their adapters."""
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
    """A table [V, D] or head [D, V] with the rows of `trainable_token_indices`."""
    module = key.name.removesuffix(".weight")
    table = key.layout == "VD->VD"
    rows = folder.get(ROOT + module + TOKENS, (None, spec.shape[table]))
    if rows is None:
        return base
    said = folder.config.get("trainable_token_indices")
    ids = next((v for k, v in said.items() if _ends(module, [k])), None) if isinstance(said, dict) else said
    size = spec.shape[not table]
    if not isinstance(ids, list) or len(ids) != len(rows) or not all(type(i) is int and 0 <= i < size for i in ids):
        raise UserError(f"trainable_token_indices does not name the {len(rows)} rows of {module}", str(folder.path))
    base = weights.dense_of(base, spec)
    return base.at[jnp.asarray(ids)].set(rows) if table else base.at[:, jnp.asarray(ids)].set(rows.T)


def _tied_table(folder: Folder, keys: dict, sizes: dict, specs: Specs, base: Stored, spec: Spec) -> Stored:
    """A table that is the head too: PEFT's copies and adapters are for one use of it, unless they are the same."""
    uses = {"lookup": (keys["embed/table"], spec)}
    uses["head"] = Key(keys["unembed/table"].name, "VD->VD"), spec.replace(eqn=HEAD)
    copies = {}
    for use, (key, _) in uses.items():
        module = key.name.removesuffix(".weight")
        copy = folder.get(ROOT + key.name, spec.shape)
        if copy is not None and _ends(module, folder.config.get("modules_to_save")):
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
    """One use of a table [V, D] as of another table: a LoRA of full rank that adds the difference."""
    change, one = copy - weights.dense_of(weights.base(base), spec), jnp.eye(copy.shape[1])
    a, b = (one, change.T) if use == "head" else (change, one)
    return LoRA(base, a, b, spec.eqn, 1.0, used=use)


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


def _lora(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec) -> Stored:
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
    return _measured(folder, key, sizes, path, leaf, spec, ranks) if c.get("use_dora") else leaf


def _measured(folder: Folder, key: Key, sizes: dict, path: str, leaf: DoRA, spec: Spec, ranks: list[int]) -> DoRA:
    """A DoRA leaf with its magnitudes; a layer without an adapter keeps the norms of its base."""
    names, group = _names(key, spec, MAGNITUDE), groups(key, spec.eqn)[1]
    if missing := [name for name, rank in zip(names, ranks) if rank and name not in folder.tensors]:
        raise UserError(f"holds no {missing[0]}", str(folder.path / TENSORS))
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
    """A bias as PEFT's IA3 has it, which rescales all that leaves a module."""
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
    *parents, name = path.split("/")
    for parent in parents:
        specs = specs[parent]
    return "b" + name.removeprefix("w") in specs


def _oft(folder: Folder, key: Key, sizes: dict, specs: Specs, path: str, base: Stored, spec: Spec) -> Stored:
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
