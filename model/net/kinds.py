"""The kinds of layers. To add a kind, write a subclass of Block and add it to KINDS.

Parameters that only one kind of layer has are stored under the kind's name, such as "attn" in "layers/attn/wq".
"""

from collections.abc import Iterable

from common.errors import UserError
from model.config import ModelConfig
from model.net.layers import Block
from model.net.recurrent import RecurrentBlock

NORMS = ("pre", "post", "both")
KINDS = {"attn": Block, "recurrent": RecurrentBlock}


def check(config: ModelConfig) -> None:
    """Raises UserError for unknown norms or layers, and for bidirectional models with layers that must be causal."""
    if config.norms not in NORMS:
        raise UserError(f"norms={config.norms!r}", "model", f"known: {', '.join(NORMS)}")
    for name in config.blocks:
        if name not in KINDS:
            raise UserError(f"no layer of kind {name!r}", "model", f"known: {', '.join(KINDS)}")
    if not config.causal and (names := without_columns(config.blocks)):
        raise UserError(
            f"{names[0]} layers depend only on earlier tokens", "model", "a bidirectional model needs attn layers"
        )


def without_columns(parts: Iterable[str]) -> list[str]:
    """Returns those kinds of layers in `parts` that do not cache a key and a value for each token."""
    return [part for part in parts if part in KINDS and not KINDS[part].columns]
