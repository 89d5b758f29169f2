"""Reads and checks the two files of a PEFT folder: adapter_config.json and adapter_model.safetensors.

Config fields have the same meaning as in PEFT. The sets in this module together contain every config field of PEFT
0.21.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import files, paths, regexes
from common.errors import UserError
from model.families._layout import Key
from model.io import hf
from model.io.pretrained import families, family

TABLES = ["embed_tokens", "wte", "lm_head"]
MAGNITUDE = ".lora_magnitude_vector"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")

# --- fields of adapter_config.json: used, irrelevant and unsupported ---

WRAPS = {"target_modules", "exclude_modules", "modules_to_save"}
LAYERS = {"layers_to_transform", "layers_pattern", "bias"}
USED = {  # {peft_type: fields that are read}
    "LORA": WRAPS | LAYERS | {
        "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights",
        "trainable_token_indices", "ensure_weight_tying",
    },
    "IA3": WRAPS,
    "OFT": WRAPS | LAYERS | {"use_cayley_neumann", "num_cayley_neumann_terms"},
} | {kind: set() for kind in VIRTUAL}  # fmt: skip
# Fields that are ignored, because they describe the adapter's origin or training, or can be derived from its tensors.
IRRELEVANT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "feedforward_modules", "r", "rank_pattern", "fan_in_fan_out", "megatron_config", "megatron_core",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "monteclora_config", "qalora_group_size", "init_ia3_weights", "init_weights", "oft_block_size", "module_dropout",
    "eps", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs",
}  # fmt: skip
REFUSED = {  # fields whose values must be in UNSET; for modules_to_save, this only applies to virtual tokens
    "alora_invocation_tokens", "use_qalora", "layer_replication", "lora_bias", "target_parameters", "use_bdlora",
    "arrow_config", "kasa_config", "coft", "block_share",
    "modules_to_save",
}  # fmt: skip
UNSET = (None, False, 0, "none", [], {})


def _number(low: float, high: float, *kinds: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in (kinds or (int, float)) and low <= x <= high


def _texts(x: Any) -> bool:
    return isinstance(x, str) or (isinstance(x, list) and all(isinstance(name, str) for name in x))


_alpha, _layer = _number(-1e6, 1e6), _number(-(2**31), 2**31, int)
VALUES: dict[str, Callable[[Any], bool]] = {  # {field: function that returns whether a value is valid}
    "peft_type": lambda x: isinstance(x, str),
    "lora_alpha": _alpha,
    "alpha_pattern": lambda x: isinstance(x, dict) and all(map(_alpha, x.values())),
    "lora_dropout": _number(0, 1),
    "layers_to_transform": lambda x: _layer(x) or (isinstance(x, list) and all(map(_layer, x))),
    "num_cayley_neumann_terms": _number(0, 99, int),
    **dict.fromkeys(("use_rslora", "use_dora", "use_cayley_neumann"), lambda x: isinstance(x, bool)),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), _texts),
}
BIASES = ("none", "all", "lora_only", "oft_only")
# Values of init_lora_weights for which PEFT leaves the base weights unchanged when it opens a folder.
DRAWN = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
STARTS = ("pissa", "olora")  # PEFT subtracts from the base weights a product that can be recomputed from them
CONVERTED = "save it again with path_initial_model_for_weight_conversion"
MERGED = "call merge_and_unload() in PEFT, save the model, and open the saved model"
OTHERS = {  # {prefix of an unsupported value of init_lora_weights: how to fix the error}
    "pissa_niter": CONVERTED, "corda": CONVERTED, "lora_ga": CONVERTED, "loftq": MERGED,
}  # fmt: skip
TRAINING = re.compile(r".*\.lora_(velora|monteclora)_.*")  # tensors that only training uses
TOKENS = ".token_adapter.trainable_tokens_delta"
PICKLE, CONVERT = (
    "adapter_model.bin",
    (
        "python -c \"import torch; from safetensors.torch import save_file; p = '{}/adapter_model'; save_file({{k: "
        "v.contiguous() for k, v in torch.load(p + '.bin', weights_only=True).items()}}, p + '.safetensors')\""
    ),
)


class Folder:
    """The config and tensors of a PEFT folder, after checks. Tensors are named as if the base were a causal model."""

    def __init__(self, path: Path):
        paths.regular(path)
        self.path, self.config, self.used = path, files.load_json(path / CONFIG), set()
        self.kind = self.config.get("peft_type")
        self._check()
        self._patterns: dict[str, re.Pattern] = {}
        tensors = {name.removesuffix(".weight") if MAGNITUDE in name else name: x for name, x in self._read().items()}
        tensors = {name: x for name, x in tensors.items() if not TRAINING.fullmatch(name)}
        before = {m[1] for n in tensors if (m := hf.FIRST.fullmatch(n.removeprefix(ROOT)))}
        self.body = next((b for b in hf.BODIES if b in before), "model.")  # multimodal base models have other prefixes
        self.unused = sorted(n for n in tensors if self.kind not in VIRTUAL and not self._wanted(n))
        self.tensors = {self._renamed(n): x for n, x in tensors.items() if n not in self.unused}
        vectors = {n: x for n, x in self.tensors.items() if n.endswith(".ia3_l")}
        # scales of inputs have the shape [1, in], and scales of outputs have the shape [out, 1]
        self.inputs = {n for n, x in vectors.items() if x.shape[0] == 1}
        self.tensors |= {n: x.reshape(-1) for n, x in vectors.items()}

    def _check(self) -> None:
        """Raises UserError if the config has values that are not supported."""
        path = str(self.path / CONFIG)
        for field, fits in VALUES.items():
            if (value := self.config.get(field)) is not None and not fits(value):
                raise UserError(f"{field}={value!r:.80} is not a valid value", path)
        if self.kind not in USED:
            known = ", ".join(USED)
            raise UserError(f"PEFT type {self.kind!r} is not supported; known: {known}", path, MERGED)
        for field, value in self.config.items():
            if field not in IRRELEVANT | USED[self.kind] and value not in UNSET:
                raise UserError(f"{field}={value!r:.80} is not supported", path, MERGED)
        if self.init not in (*DRAWN, *STARTS):
            fix = next((fix for name, fix in OTHERS.items() if self.init.startswith(name)), MERGED)
            raise UserError(f"init_lora_weights={self.init!r:.80} changes the base model's weights", path, fix)
        if self.config.get("bias", "none") not in BIASES:
            raise UserError(f"bias={self.config['bias']!r:.80} is not a value that PEFT knows", path)

    @property
    def init(self) -> str:
        """The value of init_lora_weights in lower case. It says how the adapters were initialized."""
        return str(self.config.get("init_lora_weights", True)).lower()

    def _read(self) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError, safe_open

        path = self.path / TENSORS
        if not path.exists() and (self.path / PICKLE).exists():
            what = "the adapter is only a pickle, and opening a pickle can run code"
            fix = CONVERT.format(self.path)
            raise UserError(what, str(self.path), f"if you trust it: {fix}")
        try:
            with safe_open(path, framework="np") as file:
                tensors = {n: np.asarray(file.get_tensor(n), np.float32) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError) as error:
            fix = "git lfs pull" if path.exists() and hf.is_pointer(path) else ""
            raise UserError(f"the file is not readable safetensors ({error})", str(path), fix) from None
        if broken := next((name for name, x in tensors.items() if not np.isfinite(x).all()), None):
            raise UserError(f"the weights contain NaN or infinities ({broken})", str(path))
        return tensors

    def _renamed(self, name: str) -> str:
        """Converts the name of a tensor, whose base may be a multimodal model, to its name in a causal model."""
        inner = name.removeprefix(ROOT)
        if self.body in ("model.", "transformer.") or not inner.startswith(self.body):
            head = inner.startswith("lm_head.") or not re.match(r"(.*\.)?lm_head\.", inner)
            return name if head else ROOT + inner[inner.index("lm_head.") :]
        return f"{ROOT}model.{inner.removeprefix(self.body)}"

    def _wanted(self, name: str) -> bool:
        """Returns whether PEFT would use a tensor.

        PEFT uses the adapters of modules that the config selects, and all tensors that do not belong to an adapter.
        """
        module = re.sub(
            r"\.(lora_|ia3_l|oft_R|token_adapter|base_layer).*|\.(weight|bias)$", "", name.removeprefix(ROOT)
        )
        adapter = re.search(r"\.(lora_|ia3_l|oft_R)", name)
        if not adapter:
            return True
        tables = TABLES if self.config.get("ensure_weight_tying") and ends(module, TABLES) else []
        return self.targets(module) or any(map(self.targets, tables))  # PEFT adapts both uses of a tied embedding table

    def targets(self, module: str) -> bool:
        """Returns whether, by PEFT's rules, the config puts an adapter on a module."""
        names, without = self.config.get("target_modules"), self.config.get("exclude_modules")
        copies = self.config.get("modules_to_save") or []
        if any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in copies):
            return False
        if without and (self._match(without, module) if isinstance(without, str) else ends(module, without)):
            return False
        if not names:
            return True
        if isinstance(names, str):
            linear = not ends(module, [*TABLES, "wpe"])
            return linear if names.lower() == "all-linear" else bool(self._match(names, module))
        return module in names or (ends(module, names) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        """Returns whether a module is in one of the layers in `layers_to_transform`; True if this field is not set."""
        chosen, patterns = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        if chosen is None or chosen == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
        found = (self._match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\..*", module) for p in patterns)
        match = next((m for m in found if m), None)
        return bool(match) and int(match["idx"]) in ([chosen] if isinstance(chosen, int) else chosen)

    def _match(self, pattern: str, text: str) -> re.Match | None:
        if pattern not in self._patterns:
            self._patterns[pattern] = regexes.bounded(pattern, str(self.path / CONFIG))
        return self._patterns[pattern].fullmatch(text)

    def get(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        """Returns a tensor, or None if it is missing. Raises UserError if the tensor does not have the given shape.

        An axis whose entry in `shape` is None may have any size.
        """
        x = self.tensors.get(name)
        if x is not None:
            self.used.add(name)
            if x.ndim != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape)):
                raise UserError(f"{name} has shape {x.shape}, but the model needs {shape}", str(self.path / TENSORS))
        return x

    def alpha(self, module: str) -> float:
        """Returns a module's lora_alpha: the value of the first matching pattern in alpha_pattern, or a default."""
        patterns = self.config.get("alpha_pattern") or {}
        module = self.body + module.removeprefix("model.") if self.body != "transformer." else module
        found = (value for p, value in patterns.items() if self._match(rf"(.*\.)?({p})", module))
        return float(next(found, self.config.get("lora_alpha") or 8))

    def keys(self) -> dict[str, Key]:
        """Returns the KEYS of the first model family that has a module for every tensor in the folder."""
        found = {re.sub(r"\.\d+\.", ".{}.", n).removeprefix(ROOT) for n in self.tensors if n.startswith(ROOT)}
        for keys in (family(name).KEYS for name in families()):
            known = tuple(k.name.removesuffix("weight") for k in keys.values() if k.name.endswith(".weight"))
            if all(name.startswith(known) for name in found):
                return keys
        raise UserError("the adapter's modules do not belong to a supported model family", str(self.path / TENSORS))


def ends(module: str, names: object) -> bool:
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)
