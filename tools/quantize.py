"""Quantizes a trained model, measures how much quality it loses, and saves a folder that infer.load opens.

    python -m tools.quantize --model=NAME_OR_RUN --quant=int4 --out=DIR [--method=rtn|gptq|awq|smoothquant]
        [--data=sotu] [--rows=32] [--seq_len=256] [--eval_tokens=8192] [--seed=0] [--dtype=bfloat16] [--KEY=VALUE ...]
    python -m tools.quantize --model=NAME_OR_RUN --quant=mixed --budget=0.1GB --out=DIR [...]

NAME_OR_RUN is a packaged model's name, a .gguf file, a Hugging Face folder, a hub id, or a run folder. --quant is a
format, which is the name of a file in model/quant. KEY is one of the format's arguments, as in --group=64. For a run
with quant.name=qat, --quant must be the format for which the run was trained.

--budget limits the size of the whole model (KB, MB, GB) or the bits per weight of the layers' matrices (4.5bits). Each
kind of matrix stays float or becomes int8 or int4. These formats are chosen to give the smallest total error within the
budget. --data names the documents for calibration. The last tenth of them is held out to measure the perplexity.
--dtype is the type of the weights that are not quantized. Except for run folders, only one layer at a time is loaded
for quantization.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, files
from common.errors import UserError
from common.types import Json
from configs import base, schema
from configs.schema import methods, overrides, rules

if TYPE_CHECKING:
    import numpy as np

    from data.text.tokenizer import Tokenizer
    from infer.lm import LM
    from infer.models import Run
    from model.io.pretrained import Pretrained
    from model.net.transformer import Transformer
    from model.weights import Params, Specs

MATRICES = "layers/.*"  # pattern of the matrices for which --budget chooses formats
HELD_OUT = 0.1  # fraction of the documents, taken from the end, on which the perplexity is measured


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.quantize", __doc__)
    for name in ("model", "quant", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--method", default="rtn", choices=("rtn", "gptq", "awq", "smoothquant"))
    parser.add_argument("--budget", default="")
    parser.add_argument("--data", default="sotu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    for name, default in dict(rows=32, seq_len=256, eval_tokens=8192, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, rest = parser.parse_known_args(argv)
    if min(args.rows, args.seq_len, args.seed + 1, args.eval_tokens + 1) < 1:
        raise UserError("the values must be positive", "--rows --seq_len --eval_tokens --seed")
    return quantize(args, options(args.quant, args.method, rest, budget(args.budget)))


def budget(text: str) -> tuple[float, str] | None:
    """Parses the text of --budget into (number, unit). Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|bits)", text)
    if text and not found:
        raise UserError(f"{text!r} is not a size", "--budget", "write 0.1GB, 90MB or 4.5bits, for example")
    return (float(found[1]), found[2]) if found else None


def options(quant: str, method: str, words: list[str], limit: tuple[float, str] | None) -> Json:
    """Returns the quantizer's arguments from the command line, completed with defaults. Raises UserError."""
    if limit and quant != "mixed":
        raise UserError(f"{quant} uses one format for all matrices", "--budget", "use --quant=mixed")
    known = [n for n in methods.names(methods.FOLDERS["quant"], "make") if n not in ("qat", "train8")]
    if quant not in known:
        raise UserError(f"no format {quant!r}", "--quant", f"one of {', '.join(known)}")
    keys = methods.method("quant", quant).arguments
    found = {name: key.default for name, key in keys.items()}
    if method in ("awq", "smoothquant"):
        if "scaled" not in keys:
            raise UserError(f"{method} scales inputs, which {quant} does not support", "--method", "use int4 or int8")
        found["scaled"] = True
    for word in words:
        name, _, text = word.removeprefix("--").partition("=")
        if name not in keys or not word.startswith("--"):
            raise UserError(f"{word!r} is not an argument of {quant}", "command line", f"it takes {', '.join(keys)}")
        try:
            found[name] = overrides.parse(text, keys[name].type, keys[name].nullable)
        except ValueError as e:
            raise UserError(f"{name} {e}", "command line") from None
        for problem, fix in rules.check_value(f"quant.{name}", found[name], keys[name].choices):
            raise UserError(f"{name} {text!r}: {problem}", "command line", fix)
    if limit and any(word.startswith("--formats") for word in words):
        raise UserError("--budget chooses the formats", "--formats", "give only one of the two")
    return found | {"budget": limit} if limit else found


def quantize(args: argparse.Namespace, settings: Json) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from data.text import formats as tokenizers
    from infer.lm import LM
    from infer.models import load, open_model
    from model import weights

    out, made = Path(args.out), {"arguments": vars(args), "settings": files.plain(settings)}
    if whole := saved_with(out) == made:
        print(f"{out} already holds the result of this command")
    elif out.exists() and any(out.iterdir()):
        raise UserError("the folder is not empty", str(out), "choose another --out")
    opened = open_model(args.model)
    tokenizer = tokenizers.load(opened.tokenizer_source)
    fit_on, judge_on = texts(args, tokenizer)
    if not whole:
        print(f"{args.model} · {args.quant} by {args.method} · {len(fit_on)} x {args.seq_len} tokens of {args.data}")
        model, params, trained = fitted(opened, args, settings, fit_on)
        cast = lambda w: w if weights.is_weight(w) else w.astype(args.dtype)
        params = jax.tree.map(jnp.asarray, jax.tree.map(cast, params, is_leaf=weights.is_weight))
        save(out, LM(model, params, tokenizer), trained or {"name": args.quant, **settings}, args.dtype, made)
        held = sum(x.nbytes for x in jax.tree.leaves(params))
        disk = sum(p.stat().st_size for p in out.rglob("*/state/**/*") if p.is_file())
        wide = sum(4 * x.size for x in jax.tree.leaves(model.abstract))
        print(f"bytes: {wide:,} in float32 -> {held:,} quantized; {disk:,} on disk in {out / 'ckpt'}")
    reloaded = load(out, dtype="float32")
    if args.eval_tokens:  # only measuring the perplexity needs the whole float model in memory
        before, after = load(args.model, dtype="float32").loss(judge_on), reloaded.loss(judge_on)
        n = f"{after[1]} held-out tokens of {args.data}, seed {args.seed}"
        print(f"perplexity {np.exp(before[0]):.3f} -> {np.exp(after[0]):.3f} on {n}")
    return 0


def saved_with(out: Path) -> Json:
    """Returns the arguments with which tools.quantize made a folder, or {} if it did not make the folder."""
    from model.io import saved

    try:
        return saved.read_manifest(out / "ckpt" / "0")["source"]
    except saved.Damaged:
        return {}


def texts(args: argparse.Namespace, tokenizer: "Tokenizer") -> tuple["np.ndarray", list[str]]:
    """Draws token rows [rows, seq_len] for calibration, and held-out texts with `eval_tokens` tokens in total."""
    import numpy as np

    from data import sources

    documents = [r["text"] for r in sources.records(args.data) if isinstance(r.get("text"), str)]
    cut = len(documents) - max(int(HELD_OUT * len(documents)), 1)
    if cut < 1:
        raise UserError("the data has fewer than two documents with a text", args.data)
    rng = np.random.default_rng(args.seed)
    rows, held = [], []
    for i in rng.permutation(cut):
        ids = tokenizer.encode(documents[i])
        starts = range(0, len(ids) - args.seq_len + 1, args.seq_len)
        rows += [ids[at : at + args.seq_len] for at in rng.permutation(starts)[:4]]  # at most 4 rows per document
        if len(rows) >= args.rows:
            break
    if not rows:
        raise UserError(f"no document has {args.seq_len} tokens", args.data, "lower --seq_len")
    left = args.eval_tokens
    for i in rng.permutation(range(cut, len(documents))):
        ids = tokenizer.encode(documents[i])[: min(left, 1024)]
        held, left = [*held, tokenizer.decode(ids)], left - len(ids)
        if left <= 0:
            break
    return np.array(rows[: args.rows], np.int32), held


def fitted(
    opened: "Run | Pretrained", args: argparse.Namespace, settings: Json, rows: "np.ndarray"
) -> "tuple[Transformer, Params, Json | None]":
    """Returns the model and its quantized parameters. The third value is the config's "quant" group if the run was
    trained with quant.name=qat, otherwise None."""
    import importlib
    from functools import partial

    import jax
    import numpy as np

    from model import build
    from model.quant import _calibrate, mixed, qat

    model = build.network(opened.config, "float32", args.dtype)
    if (cfg := getattr(opened, "cfg", None)) and cfg.quant.name == "qat" and not cfg.peft.name:
        if cfg.quant.format != args.quant:
            raise UserError(f"the run was trained for {cfg.quant.format}", args.model, f"--quant={cfg.quant.format}")
        params = qat.converted(opened.params(model.specs, None, "float32"))
        fake = {k: cfg.quant[k] for k in ("group", "activations") if cfg.quant[k] is not None}
        return model, params, {"name": cfg.quant.format, **fake, "where": cfg.quant.where}
    limit = settings.pop("budget", None)
    where = lambda: settings.get("where") or "|".join(where for where, _ in settings["formats"])
    check_where(model.specs, MATRICES if limit else where())
    params, layer = reader(opened, model, args.dtype)
    xs = [_calibrate.embed(model, params, rows[i : i + 8]) for i in range(0, len(rows), 8)]
    if limit:
        settings["formats"] = search(model, layer, xs[0], limit, settings["group"], args.dtype)
    if args.quant == "mixed":
        encoder = partial(mixed.encoder, **settings)
    else:
        quantizer = importlib.import_module(f"model.quant.{args.quant}").make(**settings)
        encoder = lambda path: quantizer.encode
    layers = []
    for i, (one, errors) in enumerate(_calibrate.calibrate(model, xs, layer, args.method, encoder, where())):
        text = "  ".join(f"{path} {100 * e:.2f}%" for path, e in errors.items())
        print(f"layer {i}: output error {text}", flush=True)
        layers.append(one)
    params["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return model, params, None


def search(
    model: "Transformer", layer: "Callable[[int], Params]", x: "np.ndarray", limit: tuple[float, str], group: int,
    dtype: str,
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """Returns the `formats` argument of model/quant/mixed.py. Chooses the formats that fit the budget and have the
    smallest total error on one batch `x`."""
    import jax
    import jax.numpy as jnp

    from model import weights
    from model.quant import _budget, mixed

    encoders = {name: mixed.encoder("", ((".*", name),), group) for name in ("int4", "int8")}
    specs = {weights.name(path): s for path, s in jax.tree.leaves_with_path(model.specs, is_leaf=weights.is_spec)}
    chosen = {path: spec for path, spec in specs.items() if spec.eqn and re.fullmatch(MATRICES, path)}
    wide = jnp.dtype(dtype).itemsize
    searched = sum(s.value.size for s in chosen.values())
    rest = wide * (sum(s.value.size for s in specs.values()) - searched)
    number, unit = limit
    room = number * searched / 8 if unit == "bits" else number * 10 ** {"KB": 3, "MB": 6, "GB": 9}[unit] - rest
    errors = _budget.measure(model, x, layer, encoders, MATRICES)
    table = {
        path: {f: (_budget.size(spec, encoders[f]), e) for f, e in errors[path].items()}
        | {dtype: (wide * spec.value.size, 0.0)}
        for path, spec in chosen.items()
    }
    best = _budget.choose(table, int(room))
    for path, formats in table.items():
        text = "  ".join(f"{f} {size:,} bytes, error {e:.2e}" for f, (size, e) in formats.items())
        print(f"{path} -> {best[path]}: {text}")
    taken = sum(table[path][f][0] for path, f in best.items())
    print(f"{taken:,} of {int(room):,} bytes, {8 * taken / searched:.2f} bits per weight of the layers' matrices")
    if not (formats := tuple((re.escape(path), f) for path, f in best.items() if f != dtype)):
        raise UserError(f"the whole model fits the budget in {dtype}", "--budget", "lower the budget")
    return formats


def check_where(specs: "Specs", where: str) -> None:
    """Raises UserError unless each parameter that `where` selects is a single matrix of a layer. Stacks of matrices,
    such as those of experts, cannot be calibrated."""
    import jax

    from model import weights
    from model.config import in_layers
    from model.net.kinds import without_columns

    if without_columns(specs["layers"]):
        raise UserError("only models with attention layers can be calibrated", "--model", "use --config.quant.name")
    chosen = []
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=weights.is_spec):
        if spec.eqn and re.fullmatch(where, weights.name(path)):
            chosen.append(weights.name(path))
            if not in_layers(chosen[-1]) or weights.split(spec.eqn)[0]:
                raise UserError(f"{where!r} selects {chosen[-1]}, which is not a single matrix of a layer", "--where")
    if not chosen:
        raise UserError(f"{where!r} selects no matrix", "--where", "such as layers/mlp/.*")


def reader(opened: "Run | Pretrained", model: "Transformer", dtype: str) -> "tuple[Params, Callable[[int], Params]]":
    """Returns the parameters outside the layers, and a function that reads the parameters of one layer in float32."""
    import jax
    import jax.numpy as jnp

    from model import weights

    if hasattr(opened, "read"):
        opened.check(model.specs)
        outside = {k: v for k, v in model.specs.items() if k != "layers"}
        read = lambda path, layer=None: jnp.asarray(opened.read(path, layer), "float32")
        params = weights.map_named(lambda path, _: read(path).astype(dtype), outside, is_leaf=weights.is_spec)
        specs = model.specs["layers"]
        layer = lambda i: weights.map_named(lambda path, _: read(f"layers/{path}", i), specs, is_leaf=weights.is_spec)
        return params, layer
    params = opened.load(model.specs, None, "float32")  # run folders can only be loaded as a whole
    layers = params.pop("layers")
    return jax.tree.map(lambda x: x.astype(dtype), params), lambda i: jax.tree.map(lambda x: x[i], layers)


def save(out: Path, lm: "LM", quant: Json, dtype: str, made: Json) -> None:
    """Writes a run folder with a checkpoint at step 0. Its config needs no `init`, because the checkpoint contains
    every parameter and model.json contains the model's shape."""
    import dataclasses

    from infer.models import SHAPE
    from model.io import saved

    cfg = base.get_config()
    cfg.model.param_dtype = dtype
    cfg.quant = quant
    with files.folder(out, "config.json") as work:
        files.write_json(work / "config.json", schema.to_dict(cfg))
        files.write_json(work / SHAPE, dataclasses.asdict(lm.config))
        lm.tokenizer.save(work / "tokenizer")
        saved.write(work / "ckpt" / "0", {"policy": lm.params}, {"step": 0, "frozen": {}, "source": made})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
