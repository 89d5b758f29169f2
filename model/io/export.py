"""Writes a model as a Hugging Face folder for transformers, vLLM and llama.cpp's converter."""

import dataclasses
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import files
from common.errors import UserError
from model import weights
from model.families import _layout as layout
from model.heads.scalar import TENSOR
from model.io import compressed
from model.io.hf import INDEX
from model.io.pretrained import family, open_pretrained
from model.net.transformer import Transformer
from model.quant import qat
from model.quant._leaf import Quantized
from model.weights import Params, dense_of

SHARD_BYTES = 5 * 10**9
# {dtype of the written weights: largest accepted change of the logits, as a fraction of the largest logit}
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


def export_hf(
    model: Transformer,
    params: Params,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: str = "float32",
    check: bool = True,
    generation: dict | None = None,
    dequantize: bool = False,
    card: str = "",
) -> float:
    """Merges adapters and writes the model as a new folder.

    If `check`, reads the folder back and compares its logits with the model's. The folder gets its final name only
    after this check. The arrays in `params` must be stacked over layers. Quantized weights are stored in the
    compressed-tensors format, or as floats if `dequantize` is True. A weight with an adapter is always written as
    floats. The settings in `generation`, such as the temperature, are written to generation_config.json, and the text
    `card` to README.md. A reward model is written as a transformers sequence classifier with one label. Returns the
    difference of the logits relative to the largest logit, or 0.0 if `check` is False. Raises UserError if the folder
    contains another model or other files, if the model family or the format cannot represent the model, or if the
    logits differ too much.
    """
    folder = Path(folder).absolute()
    if dtype not in TOLERANCE:
        raise UserError(f"dtype {dtype!r} is not supported", "--dtype", f"supported: {', '.join(TOLERANCE)}")
    config, generation = _configs(model, tokenizer, dtype, generation or {})
    params = dict(params)
    head = params.pop("head", None)
    if head is not None:
        config |= {"architectures": [classifier(config["architectures"][0])], "id2label": {"0": "reward"}}
        config |= {"label2id": {"reward": 0}}
    plain = _merged(model, params, dequantize)
    if any(map(weights.is_weight, jax.tree.leaves(plain, is_leaf=weights.is_weight))):
        config["quantization_config"] = compressed.config(model, plain, family(model.config.family).KEYS)
        params = compressed.weights_only(plain)
    taken = UserError("the folder exists and is not empty", str(folder), "choose a new folder")
    used = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    # A folder with the same config.json is accepted: it may come from an earlier export of the same model.
    if used and files.read_json(folder / "config.json") != files.plain(config):
        raise taken
    try:
        with files.folder(folder, "config.json") as work:
            files.write_json(work / "config.json", config)
            files.write_json(work / "generation_config.json", generation)
            tokenizer.save(work)
            if card:
                (work / "README.md").write_text(card, "utf-8")
            named = tensors(model, plain)
            if head is not None:
                named = chain(named, [(TENSOR, np.asarray(head.w)[None])])
            _write_tensors(named, work, dtype)
            delta = check_logits(model, params, work, folder, dtype, TOLERANCE[dtype]) if check else 0.0
    except FileExistsError:
        raise taken from None
    return delta


def _merged(model: Transformer, params: Params, dequantize: bool) -> Params:
    """Merges adapters into plain arrays.

    Quantized weights without adapters stay quantized, unless `dequantize` is True.
    """
    kept = lambda w: isinstance(w, Quantized) and not dequantize
    return weights.replace(qat.converted(params), model.specs, lambda _, w, spec: w if kept(w) else dense_of(w, spec))


def tensors(model: Transformer, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Converts stacked parameters to checkpoint tensors, and yields (name, array) for each tensor."""
    keys, sizes = family(model.config.family).KEYS, model.config.sizes
    holders = defaultdict(list)  # {name of a checkpoint tensor: names of our parameters that it contains}
    leaves = {weights.name(path): w for path, w in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight)}
    for path, leaf in leaves.items():
        if isinstance(leaf, Quantized):
            yield from compressed.tensors(leaf, keys[path], model.config.stack(path))
        else:
            holders[keys[path].name].append(path)
    for name, paths in holders.items():
        host = {path: np.asarray(leaves[path]) for path in paths}
        if "{}" not in name:
            yield name, layout.write([(keys[path], x) for path, x in host.items()], sizes)
            continue
        for at, layer in enumerate(model.config.stack(paths[0])):
            yield name.format(layer), layout.write([(keys[path], x[at]) for path, x in host.items()], sizes)


def _configs(model: Transformer, tokenizer: Any, dtype: str, generation: dict) -> tuple[dict, dict]:
    c = model.config
    module = family(c.family)
    config = module.hf_config(c)
    again = module.config(json.loads(json.dumps(config)))
    if again != c:
        lost = [f.name for f in dataclasses.fields(c) if getattr(again, f.name) != getattr(c, f.name)]
        raise UserError(f"family {c.family} cannot represent this model's {', '.join(lost)}", "export")
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model only {c.vocab_size}", "export")
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
    ids = {name: value for name, value in ids.items() if value is not None}
    return config | ids | {"torch_dtype": dtype}, ids | generation


def classifier(architecture: str) -> str:
    """Converts the class name of a language model in transformers to that of the corresponding sequence classifier."""
    return re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", architecture)


def _write_tensors(named: Iterable[tuple[str, np.ndarray]], folder: Path, dtype: str) -> None:
    """Writes tensors to files of at most SHARD_BYTES each, and an index if there is more than one file.

    Only the tensors of one file are in memory at a time.
    """
    from safetensors.numpy import save_file

    parts, shard, total = [], {}, 0

    def flush() -> None:
        parts.append((folder / f"part-{len(parts)}", list(shard)))
        save_file(shard, parts[-1][0], metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", parts[-1][0])  # safetensors creates files that only the owner can read
        shard.clear()

    for name, x in named:
        codes = x.dtype.itemsize == 1 or x.dtype.kind == "i"
        x = np.ascontiguousarray(x, x.dtype if codes else jnp.dtype(dtype))
        if shard and sum(t.nbytes for t in shard.values()) + x.nbytes > SHARD_BYTES:
            flush()
        shard[name] = x
        total += x.nbytes
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(parts, 1):
        final = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_logits(model: Transformer, params: Params, written: Path, final: Path, dtype: str, tolerance: float) -> float:
    """Compares the logits of `params` with those of the folder `written`, and returns the difference.

    The result is the largest difference at each position, averaged over positions and divided by the largest logit. An
    average is used because rounding errors may be 100 times larger at positions with massive activations. If the
    difference exceeds the tolerance, raises a UserError whose message contains the path `final`.
    """
    length = min(32, model.config.max_len)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length), dtype=np.int32)
    logits = jax.jit(dataclasses.replace(model, dtype="float32").__call__)
    wanted, got = (np.asarray(logits(p, tokens)) for p in (params, open_pretrained(written).load(model.specs)))
    delta = float(np.abs(got - wanted).max(-1).mean() / np.abs(wanted).max())
    if not delta <= tolerance:
        what = f"logits read back differ by {delta:.2g} of the largest logit, more than {tolerance:.0e} for {dtype}"
        raise UserError(what, str(final), "nothing was written; try a wider --dtype")
    return delta
