"""Layers that every model is made of.

Parameters are declared with their shapes only; values come from checkpoints or from
`common_jax.init.host_init`. Kernels are [in, out]; a layer computes in its `dtype`, norms in
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

REMAT = ("none", "dots", "full")


def declare(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array:
    """A parameter of `module`, by its shape alone.

    `module.param` traces an initial value at every use to learn its shape: half of the time that
    tracing a UNet takes.
    """
    if not module.has_variable("params", name):
        return module.param(name, nn.initializers.zeros, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        where = "/" + "/".join(module.path)
        raise errors.ScopeParamShapeError(name, where, value.shape, shape)
    return value


def remat_policy(remat: str) -> Callable | None:
    """What `jax.checkpoint` keeps of a layer for the backward pass: nothing (`full`), or results of
    matmuls with weights, of convolutions and of fused attention kernels (`dots`). `none` is for
    callers to leave alone."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: use one of {REMAT}")
    return _keep_products if remat == "dots" else None


def _keep_products(primitive, *avals, **parameters) -> bool:
    of_weights = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    is_convolution = primitive is jax.lax.conv_general_dilated_p
    # cuDNN's attention gives little (its output and a number a query) for much work.
    is_attention = primitive.name.startswith("dot_product_attention_fwd")
    return is_convolution or is_attention or of_weights(primitive, *avals, **parameters)


class Linear(nn.Module):
    """y = x @ kernel [C,F] + bias [F], on the last axis.

    The other axes are made one for the product: its gradients are then plain matrix products, which
    XLA computes on a CPU at twice the rate.
    Where the tree has adapters beside the kernel (`common_jax.lora`), their product is added.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = declare(self, "kernel", (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.dot(rows, kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):
            names = ("lora_a", "lora_b", "lora_scale")
            a, b, scale = (self.get_variable("params", name) for name in names)
            y = y + (rows @ a.astype(self.dtype)) @ (scale * b).astype(self.dtype)
        if self.use_bias:
            y = y + declare(self, "bias", (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """Normalise the last axis in float32; keeps x's dtype."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", (x.shape[-1],))
        bias = declare(self, "bias", (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        gain = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * gain * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divide the last axis by its root mean square, in float32; keeps x's dtype."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", (x.shape[-1],))
        wide = x.astype(jnp.float32)
        gain = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * gain).astype(x.dtype) * scale.astype(x.dtype)
