"""Reads weights that other tools have quantized (bitsandbytes, GPTQ, AWQ, fp8), and dequantizes them to floats.

The module compressed.py reads the compressed-tensors format. Each of the other formats stores the weight [N, K] of the
Linear module X as several tensors. G is the number of groups along K.

Bitsandbytes stores 4-bit codes of the flattened matrix, two per byte, in X.weight. It also stores X.weight.absmax and
X.weight.quant_map. Its 8-bit format stores X.weight [N, K] as int8, and X.SCB [N].
GPTQ with 4 bits stores X.qweight [K / 8, N], X.qzeros [G, N / 8], X.scales [G, N] and X.g_idx [K].
AWQ with 4 bits stores X.qweight [K, N / 8], X.qzeros [G, N / 8] and X.scales [G, N].
The fp8 format stores X.weight [N, K] in e4m3, and one scale per tensor, row or block in X.weight_scale_inv or
X.weight_scale.

The dequantized values are exactly those that the tools compute themselves. The argument `folder` is a
model.io.hf.Folder.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError, warn
from model.families._layout import Index
from model.io import compressed

PARTS = re.compile(
    r"(?P<weight>.*\.weight)[_.](?P<part>packed|shape|zero_point|g_idx|global_scale|scale|scale_inv|absmax|quant_map|nested_absmax|"
    r"nested_quant_map|quant_state\..*)|(?P<module>.*)\.(?P<own>qweight|qzeros|scales|g_idx|SCB|weight_format)"
)
AWQ_SLOTS = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the position of each of eight columns within a 32-bit word
FP8 = "F8_E4M3"
FORMS = {"gptq": "gptq", "gptq_v2": "gptq", "auto_gptq": "gptq", "auto-round": "gptq", "awq": "awq", "auto_awq": "awq"}
FORMS |= {"gemm": "awq"}  # other tools also use AWQ's layout and call it "gemm"


class Format(NamedTuple):
    tool: str
    shape: Callable[[Any, str], tuple[int, ...]]
    read: Callable[[Any, str, Index], np.ndarray]


def find(folder: Any) -> dict[str, Format]:
    """Returns {name of the weight: its format} for all weights that are quantized."""
    parts = defaultdict(set)
    for name in folder.shards:
        if m := PARTS.fullmatch(name):
            parts[m["weight"] or f"{m['module']}.weight"].add(m["part"] or m["own"])
    out = {name: _format(folder, name, of) for name, of in parts.items()}
    return {name: form for name, form in out.items() if form}


def names(folder: Any) -> set[str]:
    """Returns the names of all weights. A weight that is stored as several tensors is listed once."""
    weight = lambda m: m["weight"] or f"{m['module']}.weight"
    found = {name: PARTS.fullmatch(name) for name in folder.shards}
    return {n for n, m in found.items() if not m or weight(m) not in folder.coded} | folder.coded.keys()


def check(folder: Any, config: Any) -> None:
    """Raises UserError if the `quantization_config` is not supported. It is ignored if all weights are plain floats."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    where, fix = str(folder.path), compressed.UNQUANTIZED
    if method is None:
        raise UserError("weights are quantized, but quantization_config has no quant_method", where, fix)
    codes = [n for n in folder.shards if n.endswith((".weight", "_packed")) and folder.dtype(n) not in folder.floats]
    if method == compressed.METHOD and folder.coded:
        compressed.check(config, where)
    elif strange := [n for n in codes if n.removesuffix("_packed") not in folder.coded]:
        what = f"weights are quantized by {method}, which is not supported ({strange[0]})"
        raise UserError(what, where, fix)
    elif not folder.coded:
        warn("%s: ignoring the quantization_config of %s, because the weights are floats", where, method)


def _format(folder: Any, name: str, parts: set[str]) -> Format | None:
    dtype = folder.dtype(name) if name in folder.shards else None
    if "packed" in parts or ("scale" in parts and folder.method == compressed.METHOD and dtype in ("I8", FP8)):
        return Format(compressed.METHOD, compressed.shape, compressed.read)
    if "qweight" in parts:
        if folder.method not in ("gptq", "awq", "auto-round"):
            what = f"{name} is stored in a GPTQ or AWQ format, but config.json mentions neither method"
            raise UserError(what, str(folder.path))
        keys = ("checkpoint_format", "packing_format")  # the first key is from GPTQModel, the second from AutoRound
        form = next((str(v) for k in keys if (v := folder.quantized.get(k))), folder.method).rpartition(":")[2]
        if form not in FORMS:
            what = f"weights are quantized by {folder.method} in the format {form!r}, which is not supported"
            raise UserError(what, str(folder.path), compressed.UNQUANTIZED)
        return Format("AWQ", _awq_shape, _awq) if FORMS[form] == "awq" else Format("GPTQ", _gptq_shape, _gptq)
    if "absmax" in parts and dtype == "U8":
        return Format("bitsandbytes", _bnb4_shape, _bnb4)
    if "SCB" in parts and dtype == "I8":
        return Format("bitsandbytes", _stored_shape, _bnb8)
    if parts & {"scale", "scale_inv"} and dtype == FP8:
        return Format("fp8", _stored_shape, _fp8)
    return None


def _stored_shape(folder: Any, name: str) -> tuple[int, ...]:
    return folder.stored_shape(name)


def _whole(folder: Any, name: str, known: tuple[str, ...] | None = None) -> np.ndarray:
    cuts = (slice(None),) * len(folder.stored_shape(name))
    return folder.tensor(name, cuts, known or (*folder.floats, "U8", "I8", "I32", "I64"))


# --- bitsandbytes ---


def _bnb4_state(folder: Any, name: str) -> dict:
    for kind in ("nf4", "fp4"):
        if (state := f"{name}.quant_state.bitsandbytes__{kind}") in folder.shards:
            return json.loads(_whole(folder, state).tobytes())
    raise UserError(f"{name} is stored in a bitsandbytes format, but has no quant_state", str(folder.path))


def _bnb4_shape(folder: Any, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in _bnb4_state(folder, name)["shape"])


def _bnb4(folder: Any, name: str, cuts: Index) -> np.ndarray:
    """Returns quant_map[code] times the largest magnitude in the code's block.

    The high bits of a byte contain the first of its two codes.
    """
    state = _bnb4_state(folder, name)
    height, width = (int(n) for n in state["shape"])
    start, stop, _ = cuts[0].indices(height)
    first, last = start * width, stop * width
    packed = folder.tensor(name, (slice(first // 2, -(-last // 2)), slice(None)), ("U8",)).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[first % 2 :][: last - first]
    peaks = _whole(folder, f"{name}.absmax")
    if peaks.dtype == np.uint8:  # double quantization
        steps = _whole(folder, f"{name}.nested_absmax").repeat(int(state["nested_blocksize"]))[: len(peaks)]
        table = _whole(folder, f"{name}.nested_quant_map")
        peaks = table[peaks] * steps + np.float32(state.get("nested_offset", 0.0))
    values = _whole(folder, f"{name}.quant_map")[codes]
    values = values * peaks[np.arange(first, last) // int(state["blocksize"])]
    return values.astype(np.float32).reshape(-1, width)[:, cuts[1]]


def _bnb8(folder: Any, name: str, cuts: Index) -> np.ndarray:
    scale = _whole(folder, name.removesuffix("weight") + "SCB").reshape(-1, 1)[cuts[0]]
    return folder.tensor(name, cuts, ("I8",)).astype(np.float32) * (scale / np.float32(127))


# --- GPTQ and AWQ ---


def _bits(folder: Any) -> int:
    bits = folder.quantized.get("bits", 4)
    if bits not in (2, 4, 8):
        raise UserError(f"codes of {bits!r} bits are not supported; supported: 2, 4 and 8", str(folder.path))
    return bits


def _groups(folder: Any, module: str, size: int, groups: int) -> np.ndarray:
    """Returns the group index of each of the `size` inputs."""
    if (name := f"{module}g_idx") in folder.shards and folder.method != "awq":
        return _whole(folder, name)
    step = folder.quantized.get("group_size", 128)
    step = size if step in (-1, None) else step
    if -(-size // step) != groups:
        what = f"{module}scales has {groups} groups, but group_size={step} implies {-(-size // step)}"
        raise UserError(what, str(folder.path))
    return np.arange(size) // step


def _gptq_shape(folder: Any, name: str) -> tuple[int, ...]:
    words, height = folder.stored_shape(name.removesuffix("weight") + "qweight")
    return height, words * 32 // _bits(folder)


def _gptq(folder: Any, name: str, cuts: Index) -> np.ndarray:
    """Returns scale * (code - zero - 1), or scale * (code - zero) in version 2 of the GPTQ format."""
    module, bits = name.removesuffix("weight"), _bits(folder)
    codes = compressed.unpack_words(
        np.ascontiguousarray(folder.codes(f"{module}qweight", (slice(None), cuts[0])).T), bits
    )
    zeros = compressed.unpack_words(_whole(folder, f"{module}qzeros"), bits)[:, cuts[0]]
    zeros = zeros + (folder.quantized.get("checkpoint_format", "gptq") != "gptq_v2")
    scales = folder.tensor(f"{module}scales", (slice(None), cuts[0])).astype(np.float32)
    group = _groups(folder, module, codes.shape[1], len(scales))[cuts[1]]
    return (codes[:, cuts[1]] - zeros[group].T) * scales[group].T


def _awq_shape(folder: Any, name: str) -> tuple[int, ...]:
    width, words = folder.stored_shape(name.removesuffix("weight") + "qweight")
    return words * 8, width


def _awq(folder: Any, name: str, cuts: Index) -> np.ndarray:
    """Returns scale * (code - zero). The eight columns in a 32-bit word are in the order of AWQ_SLOTS."""
    if folder.quantized.get("bits", 4) != 4 or str(folder.quantized.get("version", "gemm")).lower() != "gemm":
        what = "AWQ is only supported with 4 bits and the version gemm"
        raise UserError(what, str(folder.path), "open the unquantized model")
    module = name.removesuffix("weight")
    codes = compressed.unpack_words(folder.codes(f"{module}qweight", (cuts[1], slice(None))), 4, AWQ_SLOTS)[:, cuts[0]]
    zeros = compressed.unpack_words(_whole(folder, f"{module}qzeros"), 4, AWQ_SLOTS)[:, cuts[0]]
    scales = folder.tensor(f"{module}scales", (slice(None), cuts[0])).astype(np.float32)
    width = folder.stored_shape(f"{module}qweight")[0]
    group = _groups(folder, module, width, len(scales))[cuts[1]]
    return ((codes - zeros[group]) * scales[group]).T


# --- fp8 ---


def _fp8(folder: Any, name: str, cuts: Index) -> np.ndarray:
    """Multiplies codes by their scales. Despite its name, a scale_inv tensor also contains factors, not divisors."""
    part = next(p for p in ("scale_inv", "scale") if f"{name}_{p}" in folder.shards)
    scale = _whole(folder, f"{name}_{part}").astype(np.float32)
    shape = folder.stored_shape(name)
    scale = scale.reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    if scale.shape not in ((1, 1), (shape[0], 1)):
        block = folder.quantized.get("weight_block_size") or (128, 128)
        if scale.shape != tuple(-(-n // b) for n, b in zip(shape, block)):
            what = f"{name}_{part} has shape {scale.shape}, which does not fit blocks of {block}"
            raise UserError(what, str(folder.path))
        scale = scale.repeat(block[0], 0).repeat(block[1], 1)[cuts]
    elif scale.shape[0] > 1:
        scale = scale[cuts[0]]
    return folder.tensor(name, cuts, (FP8,)).astype(np.float32) * scale
