"""cuDNN's attention by shapes alone, for plans of a GPU that is not here: it cannot be computed.

B batch, N queries, M keys, H heads, D head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive

# Named like the primitives of JAX: remat (`common_jax.layers`) and `count_flops` go by the name.
_forward = Primitive("dot_product_attention_fwd_sketched")
_backward = Primitive("dot_product_attention_bwd_sketched")
_forward.multiple_results = _backward.multiple_results = True


@_forward.def_abstract_eval
def _(q, k, v):
    batch, queries, heads, _ = q.shape
    return ShapedArray(q.shape, q.dtype), ShapedArray((batch, heads, queries), jnp.float32)


@_backward.def_abstract_eval
def _(q, k, v, out, statistics, gradient):
    return tuple(ShapedArray(x.shape, x.dtype) for x in (q, k, v))


@jax.custom_vjp
def attend_sketched(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B,N,H,D], k and v [B,M,H,D] -> [B,N,H,D]. The backward pass keeps q, k, v, the result and
    a float32 for every query and head, as cuDNN's does."""
    return _forward.bind(q, k, v)[0]


def _keep(q, k, v):
    out, statistics = _forward.bind(q, k, v)
    return out, (q, k, v, out, statistics)


attend_sketched.defvjp(_keep, lambda kept, gradient: tuple(_backward.bind(*kept, gradient)))
