"""Write a model as a Hugging Face folder: adapters merged, logits compared with what was written.

    python -m tools.export --from=NAME_OR_RUN --to=DIR [--dtype=float32|bfloat16|float16]

NAME_OR_RUN: a run folder, a packaged model's name, a .gguf file, a Hugging Face folder or a hub id.
"""

import argparse
import shlex
import sys

from configs.errors import UserError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--from", dest="source", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    try:
        return export(args.source, args.to, args.dtype)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # kept of generation_config.json


def export(source: str, to: str, dtype: str) -> int:
    from infer.models import load, open_model
    from model.export import export_hf

    settings = getattr(open_model(source), "generation", {})  # a run folder has none
    lm = load(source)
    generation = {name: settings[name] for name in SAMPLING if name in settings}
    delta = export_hf(lm.model, lm.params, lm.tokenizer, to, dtype=dtype, generation=generation)
    print(f"{to} · read back, the logits differ by at most {delta:.1g} of their scale")
    print(f"vllm serve {shlex.quote(to)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
