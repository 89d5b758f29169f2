"""Writes the text of `--help` and of `tools.config show`. Each key is explained by its comment in base.py."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base
from configs.schema import methods
from configs.schema.keys import base_keys, docs, flatten
from configs.schema.methods import Key
from configs.schema.problems import show


def lines(config: ConfigDict) -> Iterator[str]:
    """Yields one line per key, in the order of base.py: "key=value" and the meaning of the key."""
    leaves, order = flatten(config), list(docs())
    groups = {path.rpartition(".")[0]: i for i, path in reversed(list(enumerate(order)))}
    place = lambda path: order.index(path) if path in order else groups.get(path.rpartition(".")[0], 0)
    for path in sorted(leaves, key=place):
        pair = f"{path}={show(leaves[path])}"
        choices = base_keys()[path].choices if path in base_keys() else ()
        parts = [" | ".join(map(show, choices)), docs().get(path, "")]
        yield f"{pair:34}  {': '.join(filter(None, parts))}".rstrip()


def help_text(usage: str) -> str:
    parts = [usage.strip(), "", "Keys, their defaults and meanings; override with --config.KEY=VALUE:"]
    parts += [f"  {line}" for line in lines(base.get_config())]
    parts += ["", "Names of methods and their arguments:"]
    for kind, folder in methods.FOLDERS.items():
        for name in methods.names(folder, "make"):
            arguments = methods.method(kind, name).arguments.items()
            parts.append(f"  {kind}.name={name}  " + " ".join(f"{k}={_default(key)}" for k, key in arguments))
    return "\n".join(line.rstrip() for line in parts)


def _default(key: Key) -> str:
    return "REQUIRED" if key.required else show(key.default)
