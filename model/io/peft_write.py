"""Writes adapters as a PEFT folder, which can be read by PEFT, vLLM and model/io/peft_read.py."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import files
from common.errors import UserError
from model import weights
from model.families import _layout as layout
from model.families._layout import Key
from model.heads.scalar import TENSOR
from model.io.peft_folder import CONFIG, ROOT, TENSORS
from model.io.peft_read import HEAD, factor_keys, groups, has_bias
from model.io.pretrained import family
from model.net.kinds import without_columns
from model.net.transformer import Transformer
from model.peft.dora import DoRA
from model.peft.ia3 import IA3
from model.peft.lora import LoRA
from model.peft.oft import OFT, block_of
from model.peft.prefix import Prefix
from model.peft.prompt import Prompt
from model.weights import Params, Spec

TYPES = {LoRA: "LORA", DoRA: "LORA", IA3: "IA3", OFT: "OFT", Prefix: "PREFIX_TUNING"} | {Prompt: "PROMPT_TUNING"}
Tensors = dict[str, np.ndarray]


def write(path: str | Path, model: Transformer, params: Params, base: str = "", card: str = "") -> None:
    """Writes the adapters in stacked `params` as a new PEFT folder.

    `base` is the name of the base model, and `card` is the text of README.md. If PEFT cannot represent the adapters,
    raises UserError before writing any file.
    """
    path, adapters = Path(path).absolute(), {}
    if path.exists() and not (path / CONFIG).exists():  # a PEFT folder may come from an earlier run
        raise UserError("the folder exists", str(path), "choose a new folder")
    if others := without_columns(model.config.blocks):
        raise UserError(f"PEFT folders of models with {others[0]} layers are not supported", str(path))
    params = dict(params)
    head = params.pop("head", None)
    for at, w in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight):
        while weights.is_weight(w) and w.trainable:
            under = getattr(w, "base", None)
            own = w if under is None else w.replace(base=None)
            adapters.setdefault(weights.name(at), []).append(jax.tree.map(np.asarray, own))
            w = under
    kinds = {type(w) for nested in adapters.values() for w in nested}
    if len(kinds) != 1 or next(iter(kinds)) not in TYPES:
        names = ", ".join(sorted(k.__name__ for k in kinds)) or "none"
        raise UserError(f"PEFT has no format for these adapters: {names}", str(path))
    kind = kinds.pop()
    config, tensors = (_virtual if kind in (Prefix, Prompt) else _wrapped)(model, adapters)
    config |= {"peft_type": TYPES[kind], "task_type": "CAUSAL_LM", "inference_mode": True}
    if head is not None:  # as PEFT stores the head of a sequence classifier
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [TENSOR.removesuffix(".weight")]}
        tensors |= {f"{ROOT}{TENSOR}": np.asarray(head.w)[None]}
    _save(path, config | {"base_model_name_or_path": base or None}, tensors, card)


def _save(path: Path, config: dict, tensors: Tensors, card: str) -> None:
    from safetensors.numpy import save_file

    try:
        with files.folder(path, CONFIG) as work:
            files.write_json(work / CONFIG, config)
            if card:
                (work / "README.md").write_text(card, "utf-8")
            tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
            save_file(tensors, work / TENSORS, metadata={"format": "pt"})
    except FileExistsError:
        raise UserError("the folder exists", str(path), "choose a new folder") from None


def _virtual(model: Transformer, adapters: dict) -> tuple[dict, Tensors]:
    c, ((node,),) = model.config, adapters.values()
    if isinstance(node, Prompt):
        flat, heads, width = node.table, c.heads, c.embed
    else:
        flat = np.stack([node.k, node.v]).transpose(2, 1, 0, 3, 4).reshape(node.k.shape[1], -1)  # [P, L 2 K H]
        heads, width = c.kv_heads, c.kv_heads * c.head_dim
    sizes = {"num_virtual_tokens": len(flat), "num_layers": c.layers, "num_attention_heads": heads}
    return sizes | {"num_transformer_submodules": 1, "token_dim": width}, {"prompt_embeddings": flat}


def _wrapped(model: Transformer, adapters: dict) -> tuple[dict, Tensors]:
    """Converts adapters that wrap weights, such as LoRA, to the (config, tensors) of a PEFT folder."""
    keys, tied = family(model.config.family).KEYS, model.config.tied
    config: dict[str, Any] = {"fan_in_fan_out": model.config.family == "gpt2", "target_modules": []}
    modules: dict[str, list] = defaultdict(list)
    for path, nested in adapters.items():
        for leaf in nested:
            key, spec = keys[path], weights.at(model.specs, path)
            if getattr(leaf, "used", "both") == "head":
                key, spec = Key(keys["unembed/table"].name, "VD->VD"), spec.replace(eqn=HEAD)
            outputs = isinstance(leaf, IA3) and set(leaf.letters) != set(weights.split(spec.eqn)[1])
            if not (spec.stacked or isinstance(leaf, LoRA)) or (outputs and has_bias(model.specs, path)):
                raise UserError(f"PEFT's {type(leaf).__name__} computes something different for this parameter", path)
            modules[key.name.removesuffix(".weight")].append((leaf, key, spec))
            if path == "embed/table" and tied and getattr(leaf, "used", "") == "both":
                if type(leaf) is not LoRA:
                    raise UserError(f"PEFT does not support {type(leaf).__name__} on a tied embedding table", path)
                swap = lambda x: np.swapaxes(x, -1, -2)
                twin = leaf.replace(a=swap(leaf.b), b=swap(leaf.a), eqn=HEAD)
                twin = twin.replace(start=leaf.start and (swap(leaf.start[1]), swap(leaf.start[0])))
                head = Key(keys["unembed/table"].name, "VD->VD")
                modules["lm_head"].append((twin, head, spec.replace(eqn=HEAD)))
                config["ensure_weight_tying"] = True
    tensors: Tensors = {}
    for module, parts in modules.items():
        target = re.sub(r"^(model|transformer)\.|.*\{\}\.", "", module)
        config["target_modules"].append(target)
        embedding = parts[0][1].name == keys["embed/table"].name
        for suffix, x in _module(config, target, parts, model.config.sizes, embedding).items():
            each = enumerate(x) if parts[0][2].stacked else [(None, x)]
            tensors |= {f"{ROOT}{module.format(i)}{suffix}": one for i, one in each}
    return config, tensors


def _module(config: dict, target: str, parts: list, sizes: dict, embedding: bool) -> Tensors:
    """Returns {suffix of the tensor's name: tensor} for one PEFT module. The tensors are stacked over layers.

    One module may contain several of our parameters. For example, a fused qkv projection contains three.
    """
    leaf, key, spec = parts[0]
    digits = re.search(r"\d+", groups(key, spec.eqn)[1])
    if isinstance(leaf, LoRA):
        out = _factors(config, target, parts, sizes, int(digits[0]) if digits else 1, embedding)
    if digits and type(leaf) is not LoRA:
        what = f"{key.name} contains several weights, for which PEFT supports only one common {type(leaf).__name__}"
        raise UserError(what, "adapter")
    match leaf:
        case DoRA():
            return out | {".lora_magnitude_vector": leaf.magnitude}
        case LoRA():
            return out
        case IA3():
            inputs = set(leaf.letters) == set(weights.split(spec.eqn)[1])
            feedforward = config.setdefault("feedforward_modules", [])
            if inputs:
                feedforward.append(target)
            return {".ia3_l": leaf.scale[..., None, :] if inputs else leaf.scale[..., None]}
        case OFT():
            config |= {"oft_block_size": block_of(leaf.q.shape[-1]), "r": 0, "use_cayley_neumann": leaf.terms > 0}
            config["num_cayley_neumann_terms"] = leaf.terms or 5
            return {".oft_R.weight": leaf.q}


def _factors(config: dict, target: str, parts: list, sizes: dict, several: int, embedding: bool) -> Tensors:
    """Returns the tensors lora_A and lora_B of one PEFT module.

    If the module contains several of our weights, lora_A concatenates their matrices A, and lora_B is block-diagonal.
    """
    scale, found = parts[0][0].scale, []
    for leaf, key, spec in parts:
        a_key, b_key = factor_keys(key, spec.eqn)
        b_key = Key(b_key.name, re.sub(r"\d", "", b_key.layout))
        a, b = _with_start(leaf, spec)
        put = lambda k, x: layout.write([(k, x)], sizes | {"R": a.shape[-1]})  # noqa: B023
        b = b * np.float32(leaf.scale / scale) if leaf.scale != scale else b
        pairs = [(put(a_key, x), put(b_key, y)) for x, y in (zip(a, b) if spec.stacked else [(a, b)])]
        found.append((key.part, *map(np.stack, zip(*pairs))))  # A [layers, R, in], B [layers, out, R]
    rank, out = sum(a.shape[1] for _, a, _ in found), found[0][2].shape[1]
    whole = np.zeros((len(found[0][1]), several * out, rank), np.float32)
    at = 0
    for part, a, b in found:
        whole[:, part * out : (part + 1) * out, at : at + a.shape[1]] = b
        at += a.shape[1]
    both = np.concatenate([a for _, a, _ in found], 1), whole
    if not parts[0][2].stacked:
        both = tuple(x[0] for x in both)
    alpha = scale * rank
    for name, pattern, value in (("r", "rank_pattern", rank), ("lora_alpha", "alpha_pattern", alpha)):
        if config.setdefault(name, value) != value:
            config.setdefault(pattern, {})[target] = value
    config["use_dora"] = isinstance(parts[0][0], DoRA)
    suffixes = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
    return dict(zip(suffixes, both))


def _with_start(leaf: LoRA, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B whose product is the total change of the weight since initialization.

    If the product A B did not start at 0, its initial value must be subtracted, so the result has twice the rank.
    """
    if leaf.start is None:
        return leaf.a, leaf.b
    axis = leaf.b.ndim - 1 - len(weights.split(spec.eqn)[2])
    return np.concatenate([leaf.a, leaf.start[0]], -1), np.concatenate([leaf.b, -leaf.start[1]], axis)
