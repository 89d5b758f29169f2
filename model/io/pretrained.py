"""Opens checkpoints of all supported formats, and loads them into a tree of parameters, one array at a time."""

import dataclasses
import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np

from common import methods
from common.errors import UserError, reading, warn
from common.packages import locate
from common.seen import Seen
from model import weights
from model.config import ModelConfig, in_layers
from model.families import _layout as layout
from model.families._layout import Index
from model.heads import scalar
from model.io import gguf, hf
from model.weights import Params, Spec, Specs, Tree

# Tensors that are ignored: buffers in old checkpoints, and BERT's head for next-sentence prediction.
IGNORED = re.compile(
    r".*rotary_emb\.(inv_freq|(cos|sin)_cached)|.*\.attn\.(masked_)?bias|.*position_ids|(.*\.)?pooler\.dense\.\w+"
)
ROWS = 4096  # number of rows per step when comparing the head with the embedding table
IN_LAYER = re.compile(r"(?:.*\.)?(?:layers|layer|h|blk)\.(\d+)\..*(?:weight|bias)")


class Source(Protocol):
    """An opened checkpoint file or folder. Its tensors have the axis order of Hugging Face checkpoints."""

    path: Path
    hf_config: dict
    generation: dict  # bos_token_id, eos_token_id, temperature, ...

    names: set[str]
    body: str  # common name prefix of the tensors in all layers

    # converts a tensor name from the KEYS of a model family to the name in this source
    def stored(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def unused_fields(self, read: Seen) -> list[str]: ...  # config fields that were not read
    def unused_files(self) -> list[str]: ...  # weight files that are not read
    def read(self, name: str, cuts: Index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint. Its config has been read; its weights are read on demand."""

    config: ModelConfig
    source: Source
    tokenizer_source: str  # argument of data.text.formats.load
    unused: list[str] = dataclasses.field(default_factory=list)  # unused fields of the checkpoint's config
    strict: bool = False  # whether unused tensors, files or fields raise an error

    @property
    def generation(self) -> dict:
        return self.source.generation

    @property
    def keys(self) -> dict[str, layout.Key]:
        return family(self.config.family).KEYS

    def read(self, path: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        """Reads the slice `index` of the parameter `path`, in the layout of our parameters.

        `layer` is None for a parameter that is not stacked over layers.
        """
        key = self.keys[path]
        name = self.source.stored(key.name.format(layer))
        index = index or (slice(None),) * len(layout.our_shape(key, self.config.sizes))
        return layout.read(key, lambda cuts: self.source.read(name, cuts), self.config.sizes, index)

    def load(self, specs: Specs, shardings: Tree = None, dtype: str = "float32") -> Params:
        """Loads the parameters that `specs` declares, one after another. Each device receives only its own slice.

        `shardings` is a tree with the same structure as `specs`, or None to put all parameters on the first device.
        Logs one line that lists the tensors that the model does not use. Raises UserError if tensors are missing,
        unexpected or of the wrong shape; the message lists them.
        """
        unused = self.check(specs) + self.source.unused_files() + self.unused
        report("the model does not use", unused, self.tokenizer_source, self.strict)
        if shardings is None:
            shardings = jax.tree.map(lambda _: _first_device(), specs, is_leaf=weights.is_spec)

        def leaf(path: str, spec: Spec, sharding: jax.sharding.Sharding) -> jax.Array:
            slices = {}  # devices that hold the same slice share one array

            def read(index: Index) -> np.ndarray:
                at = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
                if at not in slices:
                    slices[at] = self.stacked(path, at, dtype)
                return slices[at]

            # Wait for each copy to the devices, because otherwise the host would keep several parameters in memory.
            return jax.block_until_ready(jax.make_array_from_callback(spec.shape, sharding, read))

        return weights.map_named(leaf, specs, shardings, is_leaf=weights.is_spec)

    def stacked(self, path: str, at: tuple[tuple[int, int], ...], dtype: str = "float32") -> np.ndarray:
        """Reads a slice of the stacked parameter `path`. `at` has the (start, stop) of the slice along each axis.

        Raises UserError if a value is NaN or infinite, because this would make every output NaN.
        """
        cuts = tuple(slice(*bounds) for bounds in at)
        with reading(self.tokenizer_source):
            if not in_layers(path):
                return self._finite(path, np.ascontiguousarray(self.read(path, None, cuts), dtype))
            out = np.empty([stop - start for start, stop in at], dtype)
            for i, layer in enumerate(self.config.stack(path)[slice(*at[0])]):
                out[i] = self._finite(path, self.read(path, layer, cuts[1:]))
            return out

    def _finite(self, path: str, x: np.ndarray) -> np.ndarray:
        if not np.isfinite(x).all():
            raise UserError(f"the weights contain NaN or infinities ({path})", self.tokenizer_source)
        return x

    def head(self) -> Params:
        """Returns {"head": ...} if the checkpoint is a reward model, and {} otherwise.

        A reward model is a transformers sequence classifier with one label.
        """
        name = scalar.TENSOR
        if name not in self.source.names or self.source.shape(name) != (1, self.config.embed):
            return {}
        w = self.source.read(name, (slice(None), slice(None)))
        return {"head": scalar.Scalar(jax.numpy.asarray(w[0], "float32"))}

    def check(self, specs: Specs) -> list[str]:
        """Returns the names of the tensors that the model does not use.

        Raises UserError if a parameter of `specs` is missing or has a different shape, or if the checkpoint has
        additional weights or biases in the model's layers.
        """
        problems, seen = [], set()
        for path, spec in jax.tree.leaves_with_path(specs, is_leaf=weights.is_spec):
            path = weights.name(path)
            if path not in self.keys:
                problems.append(f"{path}: model family {self.config.family} has no such parameter")
                continue
            key, stacked = self.keys[path], in_layers(path)
            if spec.shape[stacked:] != layout.our_shape(key, self.config.sizes):
                problems.append(f"{path}: needs {spec.shape[stacked:]}, has {layout.our_shape(key, self.config.sizes)}")
            for layer in self.config.stack(path) if stacked else (None,):
                name = self.source.stored(key.name.format(layer))
                seen.add(name)
                problems += self._problem(name, layout.shape(key, self.config.sizes))
        tied = {self.source.stored("lm_head.weight")} if self.config.tied else set()  # equals the embedding
        head = {scalar.TENSOR} if self.head() else set()
        extra = sorted(n for n in self.source.names - seen - tied - head if not IGNORED.fullmatch(n))
        modules = {name.rpartition(".")[0] for name in seen}
        ours = [n for n in extra if self._counts(n, modules)]
        problems += [f"unexpected {name}" for name in ours]
        if problems:
            more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise UserError("; ".join(problems[:12]) + more, self.tokenizer_source)
        return sorted(set(extra) - set(ours))

    def _counts(self, name: str, modules: set[str]) -> bool:
        """Returns whether an unused tensor is an error because it is a weight or bias in the model's layers."""
        module, _, last = name.rpartition(".")
        layer = IN_LAYER.fullmatch(name)
        inside = layer and int(layer[1]) < self.config.layers and name.startswith(self.source.body)
        return bool(inside) or (module in modules and last in ("weight", "bias"))

    def _problem(self, name: str, shape: tuple[int, ...]) -> list[str]:
        if name not in self.source.names:
            return [f"missing {name}"]
        there = self.source.shape(name)
        return [] if there == shape else [f"{name} has shape {there}, but needs {shape}"]


def open_pretrained(name: str, strict: bool = False) -> Pretrained:
    """Opens a checkpoint. `name` is a Hugging Face folder, a .gguf file, a packaged model or a Hugging Face Hub id.

    Opening a Hub id needs a network connection, unless its files have already been downloaded.
    """
    path = locate(str(name), hf.FILES)
    with reading(path):
        if path.is_dir() and not (path / "config.json").exists():
            path = gguf.inside(path) or path
        if path.is_file():
            if path.suffix != ".gguf":
                raise UserError("neither a .gguf file nor a folder", str(path))
            source = gguf.File(path)
        elif (path / "ckpt").is_dir():
            raise UserError("this is a run folder, not a checkpoint folder", str(path), "open it with infer.load")
        else:
            source = hf.Folder(path)
        config, unused = _config(source, path)
        return Pretrained(config, source, str(source.path), unused, strict)


def _config(source: Source, path: Path) -> tuple[ModelConfig, list[str]]:
    """Returns (the model's config, unused fields of the source's config)."""
    hf_config = Seen(source.hf_config)
    kind, layers = hf_config.get("model_type"), hf_config.get("num_hidden_layers") or hf_config.get("n_layer")
    if isinstance(layers, int) and layers > len(source.names):  # check this before allocating memory for each layer
        what = f"the config claims {layers:,} layers, but the files hold only {len(source.names):,} tensors"
        raise UserError(what, str(path))
    try:
        config = family(kind).config(hf_config)
        if min(config.sizes.values()) < 1:
            raise ValueError("a size is not positive")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the config of {kind} is incomplete or wrong: {error}", str(path)) from None
    return dataclasses.replace(config, tied=_tied(config, source, path)), source.unused_fields(hf_config)


def _tied(config: ModelConfig, source: Source, path: Path) -> bool:
    """Returns whether the head is tied to the embedding table.

    As in transformers, tensors take precedence over the config.
    """
    table, head = (source.stored(family(config.family).KEYS[k].name) for k in ("embed/table", "unembed/table"))
    if head not in source.names:
        classifies = scalar.TENSOR in source.names  # a classifier has no language-model head
        return config.tied or "multimodal" in source.hf_config or classifies
    if not config.tied or table not in source.names:
        return config.tied
    if source.shape(table) != source.shape(head):
        return False
    height = source.shape(table)[0]
    for start in range(0, height, ROWS):
        rows = (slice(start, min(start + ROWS, height)), slice(None))
        if not np.array_equal(source.read(table, rows), source.read(head, rows)):
            warn("%s: config.json ties the head to the embedding table, but %s differs from it and is used", path, head)
            return False
    return True


def report(what: str, names: list[str], where: str, strict: bool) -> None:
    """Logs one line that lists unused parts of a model or an adapter. If `strict`, raises UserError instead."""
    if not names:
        return
    first, kinds = {}, Counter()
    for name in names:
        kind = re.sub(r"\.\d+\.", ".*.", name)
        kinds[kind] += 1
        first.setdefault(kind, name)
    kinds = Counter({kind if n > 1 else first[kind]: n for kind, n in kinds.items()})
    depth = 9
    while len(kinds) > 8 and (depth := depth - 1) > 1:
        kinds = Counter(".".join(re.sub(r"\.\d+\.", ".*.", name).split(".")[:depth]) for name in names)
    shown = [name if n == 1 else f"{n} x {name}" for name, n in kinds.most_common(8)]
    more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
    line = f"{what} {', '.join(shown)}{more}"
    if strict:
        raise UserError(line, where, "remove it from the folder, or open the folder without strict")
    warn("%s: %s", where, line)


def families() -> list[str]:
    """Returns the names of all model families, each of which is a file in model/families."""
    return methods.known("model.families")


def family(name: Any) -> ModuleType:
    """Imports the module model/families/<name>.py. The name is the `model_type` in a Hugging Face config.json."""
    if name not in families():
        known = ", ".join(families())
        raise UserError(f"model family {name!r} is not supported; supported: {known}", "model_type")
    return importlib.import_module(f"model.families.{name}")


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
