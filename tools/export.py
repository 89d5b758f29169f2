"""Write a model as a Hugging Face folder: adapters merged, logits compared with what was written.

    python -m tools.export --from=NAME_OR_RUN --to=DIR [--dtype=float32|bfloat16|float16]

NAME_OR_RUN: a run folder, a packaged model's name, a .gguf file, a Hugging Face folder or a hub id.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

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


def export(source: str, to: str, dtype: str) -> int:
    from model.export import export_hf

    model, params, tokenizer, generation = opened(source)
    delta = export_hf(model, params, tokenizer, to, dtype=dtype, generation=generation)
    print(f"{to} · read back, the logits differ by at most {delta:.1g} of their scale")
    print(f"vllm serve {shlex.quote(to)}")
    return 0


def opened(source: str) -> tuple[Any, Any, Any, dict]:
    """(model, stacked params, tokenizer, settings of generation) of a run folder or of an open checkpoint."""
    if (Path(source) / "ckpt").is_dir():
        from infer.load import load

        run = load(source)
        return run.model, run.params, run.tokenizer, {}
    from data.tokenizer import load as load_tokenizer
    from model.pretrained import open_pretrained
    from model.transformer import Transformer

    pretrained = open_pretrained(source)
    model = Transformer(pretrained.config)
    sampling = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    generation = {name: value for name, value in pretrained.generation.items() if name in sampling}
    return model, pretrained.load(model.specs), load_tokenizer(pretrained.tokenizer_source), generation


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
