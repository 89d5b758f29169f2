"""Reads and writes quantized weights in the compressed-tensors format, which vLLM and transformers can read.

The weight [N, K] of a Linear module is stored as codes and scales. The scales are in the tensor `weight_scale`. The
codes are either in the tensor `weight` (int8 or e4m3), or packed in `weight_packed`, where `weight_shape` has their
original shape. Each int32 in `weight_packed` contains several consecutive codes of a row. To make these codes
nonnegative, half of their range is added to them: 8 for 4-bit codes, and 128 for 8-bit codes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from model import weights
from model.families import _layout as layout
from model.families._layout import Index, Key
from model.net.transformer import Transformer
from model.quant._leaf import Quantized
from model.quant._matrix import letters
from model.quant.fp8 import FP8
from model.quant.int4 import Int4
from model.quant.int8 import Int8
from model.weights import Params

if TYPE_CHECKING:
    from model.io.hf import Folder

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
UNQUANTIZED = "open the unquantized model or its .gguf file"


def config(model: Transformer, params: Params, keys: dict[str, Key]) -> dict:
    """Returns the `quantization_config` that describes stacked parameters.

    Raises UserError for a quantized weight that the format cannot represent.
    """
    groups: list[tuple[dict, list[str]]] = []
    ignored = ["lm_head"] if model.config.tied else []
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight):
        path = weights.name(path)
        if not isinstance(leaf, Quantized):
            spec = weights.at(model.specs, path)
            if spec.eqn and "V" not in weights.split(spec.eqn)[1]:  # embedding tables are not Linear modules in torch
                ignored.append(_target(model, path, keys[path]))
            continue
        scheme = _scheme(path, leaf, keys[path])
        same = next((targets for known, targets in groups if known == scheme), None)
        if same is None:
            groups.append((scheme, same := []))
        same.append(_target(model, path, keys[path]))
    named = [scheme | {"targets": ["Linear"] if len(groups) == 1 else targets} for scheme, targets in groups]
    formats = {scheme["format"] for scheme in named}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(named)},
        "ignore": ignored,
    }


def _target(model: Transformer, path: str, key: Key) -> str:
    """Returns a regex for the modules that store the parameter `path`, in all layers that have this parameter."""
    name = key.name.removesuffix(".weight")
    if "{}" not in name:
        return name
    layers = list(model.config.stack(path))
    number = r"\d+" if len(layers) == model.config.layers else f"({'|'.join(map(str, layers))})"
    return "re:^" + re.escape(name).replace(re.escape("{}"), number) + "$"


def _scheme(path: str, leaf: Quantized, key: Key) -> dict:
    (shared, k, n), tile, size = letters(leaf.eqn), leaf.tile, leaf.kn
    problem = ""
    if shared or layout.parse(key.layout)[0] != [n, k] or "V" in weights.split(leaf.eqn)[1]:
        problem = "is not a separate Linear module in this format"
    elif not isinstance(leaf, Int4 | Int8 | FP8) or leaf.codes.dtype == jnp.float8_e5m2:
        problem = "has a type that the format lacks; supported: int4, int8 and fp8 (e4m3)"
    elif leaf.offset is not None:
        problem = "has zero points that are not integers, which the format cannot store: quantize with --symmetric=True"
    elif leaf.inverse is not None:
        problem = "has input scales from AWQ or SmoothQuant, which the format cannot store: quantize with --method=gptq"
    elif size[0] % tile[0] or tile[1] not in (1, size[1]) or (tile[0] < size[0] and tile[1] > 1):
        problem = f"has one scale per {tile} tile of a {size} matrix, but the format needs equal groups of a column"
    if problem:
        raise UserError(f"{path} {problem}", "compressed-tensors", "or write floats with --dequantize")
    strategy = "group" if tile[0] < size[0] else "channel" if tile[1] == 1 else "tensor"
    kind, bits = "float" if isinstance(leaf, FP8) else "int", 4 if isinstance(leaf, Int4) else 8
    by_token = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    group = {"group_size": tile[0]} if strategy == "group" else {}
    return {
        "weights": dict(num_bits=bits, type=kind, symmetric=True, strategy=strategy, dynamic=False) | group,
        "input_activations": by_token if leaf.activations else None,
        "format": "float-quantized" if kind == "float" else "int-quantized" if leaf.activations else "pack-quantized",
    }


def weights_only(params: Params) -> Params:
    """Returns `params` with unquantized activations, because `read` does not restore how activations are quantized."""
    float_inputs = lambda w: w.replace(activations=False) if isinstance(w, Int8) else w
    return jax.tree.map(float_inputs, params, is_leaf=weights.is_weight)


def tensors(leaf: Quantized, key: Key, layers: Iterable[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) for each tensor that stores the quantized weight `leaf`, for all its `layers`.

    Call `config` first, which raises an error if the format cannot represent the weight.
    """
    kind = _scheme("", leaf, key)
    for at, layer in enumerate(layers) if "{}" in key.name else [(None, None)]:
        one = leaf if at is None else jax.tree.map(lambda x, i=at: x[i], leaf)
        name, numbers = key.name.format(layer), np.asarray(one.numbers(one.in_order(one.codes))).T
        scale = np.asarray(one.scales()).T
        yield f"{name}_scale", scale.reshape(-1) if kind["weights"]["strategy"] == "tensor" else scale
        if kind["format"] == "pack-quantized":
            yield f"{name}_packed", pack(numbers.astype(np.int32), kind["weights"]["num_bits"])
            yield f"{name}_shape", np.array(numbers.shape, np.int64)
        else:
            yield name, numbers.astype(np.asarray(one.codes).dtype)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Packs signed codes [N, K] of 4 or 8 bits into int32 [N, ceil(K * bits / 32)], starting at the lowest bits."""
    each, half = 32 // bits, 2 ** (bits - 1)
    codes = np.pad((numbers + half).astype(np.uint32), [(0, 0), (0, -numbers.shape[1] % each)])
    shifted = codes.reshape(len(codes), -1, each) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(shifted, -1).view(np.int32)


def unpack(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The inverse of `pack`, for a matrix with `k` columns."""
    return unpack_words(words, bits)[:, :k] - 2 ** (bits - 1)


def unpack_words(words: np.ndarray, bits: int, slots: np.ndarray | None = None) -> np.ndarray:
    """Unpacks int32 words along the last axis. By default, the first code of a word is in the lowest bits.

    Otherwise, `slots` lists the position of each code within a word.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = words.view(np.uint32)[..., None] >> (shifts if slots is None else shifts[slots]) & ((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.int32)


# --- reading ---


def check(config: dict, where: str) -> None:
    """Raises UserError if `read` does not support this `quantization_config` of compressed-tensors."""
    form = config.get("format")
    extra = next((k for k in ("transform_config", "kv_cache_scheme") if config.get(k)), None)
    if form not in FORMATS or extra:
        what = f"{METHOD} with {extra}" if extra else f"{METHOD} in its format {form!r}"
        raise UserError(f"weights are quantized by {what}, which is not supported", where, UNQUANTIZED)


def shape(folder: "Folder", name: str) -> tuple[int, ...]:
    """Returns the shape of a weight that is stored in the compressed-tensors format."""
    if f"{name}_packed" not in folder.shards:
        return folder.stored_shape(name)
    rows, columns = (int(n) for n in folder.codes(f"{name}_shape", (slice(2),)))
    held = folder.stored_shape(f"{name}_packed")
    if held not in [(rows, -(-columns * bits // 32)) for bits in (4, 8)]:
        what = f"{name}_shape is {rows} x {columns}, which does not match the shape {held} of the packed codes"
        raise UserError(what, str(folder.path))
    return rows, columns


def read(folder: "Folder", name: str, cuts: Index) -> np.ndarray:
    """Reads a slice of a weight, dequantized to float32."""
    height, columns = folder.shape(name)
    if f"{name}_packed" in folder.shards:
        words = folder.codes(f"{name}_packed", (cuts[0], slice(None)))
        numbers = unpack(words, 4 if words.shape[1] == -(-columns // 8) else 8, columns)
    else:
        numbers = folder.codes(name, (cuts[0], slice(None)))
    held = folder.stored_shape(f"{name}_scale")
    groups = held[1] if len(held) > 1 else 1
    odd = [part for part in ("zero_point", "g_idx", "global_scale") if f"{name}_{part}" in folder.shards]
    if odd or held[0] not in (1, height) or not groups or columns % groups:
        what = f"zero points or uneven groups ({', '.join(odd) or held})"
        raise UserError(f"{name} has {what}, which are not supported", str(folder.path), UNQUANTIZED)
    rows = cuts[0] if held[0] > 1 else slice(None)  # otherwise, the whole tensor has one scale
    scale = folder.tensor(f"{name}_scale", (rows, *[slice(None)] * (len(held) - 1))).astype(np.float32)
    scale = np.repeat(scale.reshape(-1, groups), columns // groups, 1)
    return (numbers.astype(np.float32) * scale)[:, cuts[1]]
