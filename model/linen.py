"""Applies PEFT and quantization to the Dense, Embed and Conv modules of any flax.linen model, without code changes.

Some arrays in the model's parameter tree are replaced by `Weight` objects. `wrap` returns a function that multiplies by
the `Weight` wherever Linen would multiply by the array. `weights.partition` and `weights.dense` also work on such
trees. For example, this code adds LoRA to all kernels of a model:

    apply = lambda params, x: model.apply({"params": params}, x)
    specs = linen.specs(apply, params, x)
    params = lora.make(rank=8, where=".*/kernel")(params, specs, key)
    y = linen.wrap(apply, specs)(params, x)
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jax import Array

from common.errors import UserError
from model import weights
from model.weights import AXES, Params, Spec, Specs, operands

TAPS = "XYZ"  # einsum letters of a convolution kernel's spatial axes


def specs(apply: Callable, params: Params, *args: Any, **kwargs: Any) -> Specs:
    """Returns a tree with a Spec for each parameter in `params`, found by tracing `apply(params, ...)` once.

    A parameter that is not the weight of a Dense, Embed or Conv module gets the equation "". PEFT and quantization
    leave it unchanged. Raises UserError if the model calls none of these modules.
    """
    found: dict[str, str] = {}

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if (eqn := _equation(module)) and context.method_name == "__call__":
            found["/".join((*module.path, _name(module)))] = eqn
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(apply, params, *args, **kwargs)

    def spec(path: str, x: Array) -> Spec:
        eqn = found.get(path, "")
        names = tuple(AXES[c] for c in operands(eqn)[1]) if eqn else ()
        lead = (None,) * (x.ndim - len(names))  # leading axes, if the model stacks its layers
        return Spec(jax.ShapeDtypeStruct(x.shape, x.dtype), (*lead, *names), eqn=eqn)

    if not found:
        raise UserError("the model calls no Dense, Embed or Conv", "linen.specs")
    return weights.map_named(spec, params)


def wrap(apply: Callable, specs: Specs) -> Callable:
    """Returns a function like `apply` that also accepts a `Weight` in place of a kernel or an embedding table.

    Dense and Embed multiply by the `Weight` directly. Conv first merges it into a plain kernel, which is small compared
    to the images.
    """
    declared = {weights.name(path): s for path, s in jax.tree.leaves_with_path(specs, is_leaf=weights.is_spec)}

    def multiply(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        leaf = module.get_variable("params", _name(module)) if _equation(module) else None
        if not weights.is_weight(leaf) or context.method_name not in ("__call__", "attend"):
            return call(*args, **kwargs)
        if type(module) is nn.Dense and module.dot_general is module.dot_general_cls is None:
            return _dense(module, leaf, *args, **kwargs)
        if type(module) is nn.Embed:
            return _embed(module, leaf, context.method_name, *args, **kwargs)
        spec = declared["/".join((*module.path, _name(module)))]
        whole = jax.ShapeDtypeStruct(spec.shape[spec.stacked :], spec.value.dtype)
        merged = leaf.dense(spec.replace(value=whole, names=spec.names[spec.stacked :]))
        own = {**module.variables["params"], _name(module): merged}
        return module.clone(parent=None, name=None).apply({"params": own}, *args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(multiply):
            return apply(*args, **kwargs)

    return run


def _equation(module: nn.Module) -> str:
    """Returns the einsum equation of a Dense, Embed or Conv module, and "" for any other module."""
    match module:
        case nn.Dense():
            return "BD,DF->BF"
        case nn.Embed():
            return "BV,VD->BD"
        case nn.Conv():
            size = module.kernel_size
            taps = TAPS[: 1 if isinstance(size, int) else len(size)]
            return f"B{taps}D,{taps}DF->BF"
    return ""


def _name(module: nn.Module) -> str:
    return "embedding" if isinstance(module, nn.Embed) else "kernel"


def _dense(module: nn.Dense, leaf: weights.Weight, inputs: jax.Array) -> jax.Array:
    bias = module.get_variable("params", "bias") if module.use_bias else None
    # Any array of a `Weight` will do: all have the dtype of the array that the `Weight` replaces.
    x, _, bias = promote_dtype(inputs, jax.tree.leaves(leaf)[0], bias, dtype=module.dtype)
    y = weights.einsum("BD,DF->BF", x.reshape(-1, x.shape[-1]), leaf)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _embed(module: nn.Embed, leaf: weights.Weight, method: str, inputs: jax.Array) -> jax.Array:
    dtype = module.dtype or module.param_dtype
    if method == "__call__":
        return weights.take(leaf, inputs, dtype)
    x = inputs.astype(dtype)
    y = weights.einsum("BD,VD->BV", x.reshape(-1, x.shape[-1]), leaf)
    return y.reshape(*x.shape[:-1], y.shape[-1])
