"""Writes a model as a Hugging Face folder with adapters merged, reads the folder back and compares the logits.

    python -m tools.export --from=NAME_OR_RUN --to=DIR [--adapter=DIR] [--dtype=float32|bfloat16|float16]
    python -m tools.export --from=RUN --to=DIR --adapter-only
    python -m tools.export --from=NAME_OR_RUN --to=FILE.gguf --format=gguf [--dtype=F16|BF16|F32|Q8_0|Q4_0|Q4_1]

NAME_OR_RUN is a run folder, a packaged model's name, a .gguf file, a Hugging Face folder or a hub id. --adapter names a
run or PEFT folder with an adapter to add. --adapter-only writes a PEFT folder. int4, int8 and fp8 weights stay
quantized, in the compressed-tensors format, and --dtype applies to the scales and to all other weights. --dequantize
writes quantized weights as floats. Adapters on a quantized base can be merged only with --dequantize; the result then
includes the base's quantization error.
"""

import re
import shlex
import sys
from pathlib import Path

from common import cli, packages
from common.errors import UserError
from common.types import Json
from configs import schema
from tools.report import data as report


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.export", __doc__)
    parser.add_argument("--from", dest="source", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--adapter-only", action="store_true")
    parser.add_argument("--dequantize", action="store_true")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--format", default="hf", choices=("hf", "gguf"))
    args = parser.parse_args(argv)
    if args.adapter_only:
        export_adapter(args.source, args.adapter, args.to)
    elif args.format == "gguf":
        export_gguf(args.source, args.adapter, args.to, args.dtype or "F16")
    else:
        export(args.source, args.adapter, args.to, args.dtype or "float32", args.dequantize)


SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)  # kept from generation_config.json


def export(source: str, adapter: str, to: str, dtype: str, dequantize: bool) -> None:
    from infer.models import load, open_model
    from model import weights
    from model.io.export import export_hf

    settings = getattr(open_model(source), "generation", {})  # a run folder has no generation settings
    lm = load(source, adapter or None)
    if weights.quantized_under_adapters(lm.params) and not dequantize:
        what = "the adapters are on a quantized base"
        raise UserError(what, adapter or source, "use --adapter-only to keep them separate or --dequantize to merge")
    generation = {name: settings[name] for name in SAMPLING if name in settings}
    kind = "AutoModelForSequenceClassification" if "head" in lm.params else "AutoModelForCausalLM"
    use = [
        f"from transformers import {kind}, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({to!r})",
        f"model = {kind}.from_pretrained({to!r})",
    ]
    delta = export_hf(
        lm.model, lm.params, lm.tokenizer, to, dtype=dtype, generation=generation, dequantize=dequantize,
        card=card(to, source, adapter, use),
    )  # fmt: skip
    print(f"{to} · read back: the logits differ by {delta:.1g} of the largest logit")
    print(*use, *([] if "head" in lm.params else [f"or: vllm serve {shlex.quote(to)}"]), sep="\n")


def export_gguf(source: str, adapter: str, to: str, kind: str) -> None:
    from data.text import gguf_write as words
    from infer.models import load
    from model.io import gguf_write

    lm = load(source, adapter or None)
    delta = gguf_write.write(to, lm.model, lm.params, words.metadata(lm.tokenizer, lm.config.vocab_size), kind.upper())
    print(f"{to} · read back: the logits differ by {delta:.1g} of the largest logit")


def export_adapter(source: str, adapter: str, to: str) -> None:
    from infer.models import load, open_model
    from model.io import peft_write

    base = source if adapter else getattr(getattr(open_model(source), "cfg", None), "init", "")
    base = packages.HUB.get(base, base)
    lm = load(source, adapter or None)
    kind = "SequenceClassification" if "head" in lm.params else "CausalLM"
    use = [
        f"from peft import AutoPeftModelFor{kind}",
        f"model = AutoPeftModelFor{kind}.from_pretrained({to!r})",
    ]
    peft_write.write(to, lm.model, lm.params, base, card(to, source, adapter, use, "peft"))
    print(f"{to} · an adapter for {base or 'its base model'}", *use, sep="\n")


# --- the model card ---


def card(to: str, source: str, adapter: str, use: list[str], library: str = "transformers") -> str:
    """Returns the README.md of a model exported from `source` with `adapter`, including the metadata for the Hugging
    Face hub."""
    run = Path(adapter or source).expanduser()
    config, step = configured(run)
    name = source if adapter or not config else origin(source)
    base = packages.HUB.get(name, Path(name).name if Path(name).exists() else name)
    head = ["---", f"library_name: {library}", *([f"base_model: {base}"] if "/" in base else []), "---"]
    summary = f"{base} with the adapter {run.name}, exported by Kungfu." if adapter else f"{base}, exported by Kungfu."
    if config:
        data = re.sub(r"[^,]*/", "", config["data"]["source"])  # without local folder names
        how = report.of_run(report.Run(run, config, {}, {}, [], []))
        summary = f"{how} of {base}" if base else how
        steps = f"{step:,} steps" if step == config["steps"] else f"{step:,} of {config['steps']:,} steps"
        summary += f": {steps} on `{data}`, trained with Kungfu."
    lines = [*head, "", f"# {Path(to).name}", "", summary]
    if name in packages.PACKAGES and packages.packaged(name).suffix == ".gguf":
        lines += ["", "The base was read from a 4-bit copy (GGUF, Q4_1), whose weights differ slightly from the hub's."]
    return "\n".join([*lines, "", "```python", *use, "```", ""])


def origin(source: str) -> str:
    """Returns the name of the model from which a run, or a chain of runs, has started, or "" for random weights."""
    while config := configured(Path(source).expanduser())[0]:
        source = config["init"]
    return source


def configured(folder: Path) -> tuple[Json, int]:
    """Returns (config, step) for a run folder at its newest step, or for the folder RUN/ckpt/STEP. Returns ({}, 0) for
    any other model."""
    from infer.models import is_run, run_at

    if not is_run(folder):
        return {}, 0
    run = run_at(folder)
    return schema.to_dict(run.cfg), run.saved.step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
