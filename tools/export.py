"""Write a model as a Hugging Face folder: adapters merged, logits compared with what was written.

    python -m tools.export --from=NAME_OR_RUN --to=DIR [--adapter=DIR] [--dtype=float32|bfloat16|float16]
    python -m tools.export --from=RUN --to=DIR --adapter-only
    python -m tools.export --from=NAME_OR_RUN --to=FILE.gguf --format=gguf [--dtype=F16|BF16|F32|Q8_0|Q4_0|Q4_1]

NAME_OR_RUN: a run folder, a packaged model's name, a .gguf file, a Hugging Face folder or a hub id. --adapter: a run or
PEFT folder that is put on it. --adapter-only writes a PEFT folder. Weights in int4, int8 or fp8 stay so, in the
compressed-tensors format; --dtype is that of the rest and of the scales. --dequantize writes them as floats. Adapters
on a quantized base are merged into such floats only, which are not those that the adapter will meet elsewhere.
"""

import shlex
import sys

from common import cli
from common.errors import UserError


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


SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # kept of generation_config.json


def export(source: str, adapter: str, to: str, dtype: str, dequantize: bool) -> None:
    from infer.models import load, open_model
    from model import weights
    from model.io.export import export_hf

    settings = getattr(open_model(source), "generation", {})  # a run folder has none
    lm = load(source, adapter or None)
    if weights.quantized_under_adapters(lm.params) and not dequantize:
        what = "its adapters lie on a quantized base"
        raise UserError(what, adapter or source, "--adapter-only keeps them apart, --dequantize merges")
    generation = {name: settings[name] for name in SAMPLING if name in settings}
    delta = export_hf(lm.model, lm.params, lm.tokenizer, to, dtype=dtype, generation=generation, dequantize=dequantize)
    print(f"{to} · read back, the logits differ by at most {delta:.1g} of their scale")
    print(f"vllm serve {shlex.quote(to)}")


def export_gguf(source: str, adapter: str, to: str, kind: str) -> None:
    from data.text import gguf_write as words
    from infer.models import load
    from model.io import gguf_write

    lm = load(source, adapter or None)
    delta = gguf_write.write(to, lm.model, lm.params, words.metadata(lm.tokenizer, lm.config.vocab_size), kind.upper())
    print(f"{to} · read back, the logits differ by at most {delta:.1g} of their scale")


def export_adapter(source: str, adapter: str, to: str) -> None:
    from infer.models import load, open_model
    from model.io import peft_write

    opened = open_model(source)
    base = source if adapter else getattr(getattr(opened, "cfg", None), "init", "")
    lm = load(source, adapter or None)
    peft_write.write(to, lm.model, lm.params, base)
    print(f"{to} · PeftModel.from_pretrained(base, {to!r}) opens it on {base or 'its base'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
