"""The residual bottleneck of the fusers, forward and backward, on one parameter tree.

A block maps C channels to P = `width` by a branch 1x1 (C -> P/4), 3x3 (P/4 -> P/4), 1x1 (P/4 -> P)
and a 1x1 shortcut (C -> P). Every convolution is bias-free and followed by a group norm, with ReLU
after the first two and after the sum. The shortcut is the identity where C = P.

The gradient is written out: a block keeps three products and the statistics of its norms, where
autodiff keeps three times as much, turns gradients around before each product (on the CPU the
dearest step of all) and takes longer to compile. Inputs are constants: taps of a frozen backbone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GROUP_NORM_EPS = 1e-5
IMAGE = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What is static about a stack of `count` blocks from `channels` to `width`.

    P and P/4 must be divisible by `groups`. dtype: of the products; norms and sums are float32.
    remat: keep nothing for the gradient, run a block again when its turn comes.
    """

    count: int
    channels: int
    width: int
    groups: int = 32
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        if self.width % 4 or (self.width // 4) % self.groups:
            raise ValueError(
                f"projection_dim is {self.width}: a quarter of it must be a multiple of the "
                f"{self.groups} groups of its norms. Take a multiple of {4 * self.groups}, "
                "or set norm_groups lower."
            )

    @property
    def mid(self) -> int:
        return self.width // 4

    @property
    def has_shortcut(self) -> bool:
        return self.channels != self.width


# ------------------------------------------------------------------------------------ group norm
def _average(values, groups: int):
    """[n, C] -> mean over the channels of each group, repeated over the group."""
    size = values.shape[-1] // groups
    matrix = np.kron(np.eye(groups), np.full((size, size), 1 / size)).astype(np.float32)
    return jnp.matmul(values, matrix, precision="highest")


def norm_stats(y, groups: int):
    """Group mean and reciprocal deviation of y [n, M, C], both [n, C]."""
    means = y.mean(1)
    seconds = jnp.square(y - means[:, None]).mean(1)
    mean = _average(means, groups)
    variance = _average(seconds + jnp.square(means - mean), groups)
    return mean, jax.lax.rsqrt(variance + GROUP_NORM_EPS)


def apply_norm(norm, y, stats):
    mean, inverse = stats
    gain = inverse * norm["scale"]
    return y * gain[:, None] + (norm["bias"] - mean * gain)[:, None]


def norm_gradient(norm, y, stats, g, groups: int):
    """(gradient of y, gradients of scale and bias) for the gradient g of the normed map."""
    mean, inverse = stats
    total, moment = g.sum(1), (g * y).sum(1)
    moment = inverse * (moment - mean * total)
    scaled = jnp.concatenate([norm["scale"] * total, norm["scale"] * moment])
    first, second = jnp.split(_average(scaled, groups) / y.shape[1], 2)
    slope = inverse * inverse * second
    dy = g * (inverse * norm["scale"])[:, None] - y * slope[:, None]
    dy = dy + (slope * mean - inverse * first)[:, None]
    return dy, {"scale": moment.sum(0), "bias": total.sum(0)}


# -------------------------------------------------------------------------------------- products
def _multiply(x, kernel, dtype, axes=(1, 0)):
    """Product over the given axes in `dtype`, summed in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jax.lax.dot_general(x, kernel, numbers, preferred_element_type=jnp.float32)


def _convolve(x, kernel, dtype):
    return jax.lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        "SAME",
        dimension_numbers=IMAGE,
        preferred_element_type=jnp.float32,
    )


def _convolve_gradient(x, kernel, g, dtype):
    """Gradients of x and of the kernel. The kernel's is nine products: the CPU has no fast
    convolution of image-sized windows inside a loop."""
    n, h, w, c = x.shape
    dx = _convolve(g, kernel[::-1, ::-1].swapaxes(-1, -2), dtype)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    g = g.reshape(n * h * w, -1)
    taps = [
        _multiply(padded[:, i : i + h, j : j + w].reshape(-1, c), g, dtype, (0, 0))
        for i in range(3)
        for j in range(3)
    ]
    return dx, jnp.stack(taps).reshape(kernel.shape)


# ------------------------------------------------------------------------------------- one block
def block_forward(tree, x, side: tuple[int, int], block: BlockShape):
    """(output [n, M, P] float32, what the gradient needs) of one block on x [n*M, C]."""
    m = side[0] * side[1]

    def keep(y):
        y = y.reshape(-1, m, y.shape[-1])
        return y, norm_stats(y, block.groups)

    kept = {"conv1": keep(_multiply(x, tree["conv1"]["kernel"], block.dtype))}
    if block.has_shortcut:
        kept["shortcut"] = keep(_multiply(x, tree["shortcut"]["kernel"], block.dtype))
    image = _activate(tree, kept, "conv1").reshape(-1, *side, block.mid)
    kept["conv2"] = keep(_convolve(image, tree["conv2"]["kernel"], block.dtype))
    kept["conv3"] = keep(_expand(tree, kept, block))
    output = _join(tree, x, kept)
    kept["conv3"] = kept["conv3"][1]  # its product is cheaper to repeat than to keep
    return output, {} if block.remat else kept


def _activate(tree, kept, name):
    return jax.nn.relu(apply_norm(tree[name]["norm"], *kept[name]))


def _expand(tree, kept, block: BlockShape):
    """The last product of the branch, [n, M, P]."""
    a = _activate(tree, kept, "conv2")
    y = _multiply(a.reshape(-1, block.mid), tree["conv3"]["kernel"], block.dtype)
    return y.reshape(*a.shape[:2], -1)


def _join(tree, x, kept):
    """ReLU of branch plus shortcut, [n, M, P]."""
    y = apply_norm(tree["conv3"]["norm"], *kept["conv3"])
    if "shortcut" in kept:
        return jax.nn.relu(y + apply_norm(tree["shortcut"]["norm"], *kept["shortcut"]))
    return jax.nn.relu(y + x.reshape(y.shape).astype(jnp.float32))


def block_backward(tree, x, kept, gradient_of, side: tuple[int, int], block: BlockShape):
    """(gradients of `tree`, extra), where `gradient_of(output [n, M, P])` gives the gradient of
    the output and anything extra that the caller wants from the output."""
    dtype, grads = block.dtype, {}
    if not kept:
        kept = block_forward(tree, x, side, dataclasses.replace(block, remat=False))[1]
    kept = {**kept, "conv3": (_expand(tree, kept, block), kept["conv3"])}

    def through_norm(name, g):
        # Barriers keep gradients in the order of the maps; XLA would write them transposed.
        y, stats = kept[name]
        g = jax.lax.optimization_barrier(g)
        dy, norm = norm_gradient(tree[name]["norm"], y, stats, g, block.groups)
        grads[name] = {"norm": norm}
        return jax.lax.optimization_barrier(dy).reshape(-1, y.shape[-1])

    output = _join(tree, x, kept)
    g, extra = gradient_of(output)
    g = jnp.where(output > 0, g, 0)
    if block.has_shortcut:
        grad = _multiply(x, through_norm("shortcut", g), dtype, (0, 0))
        grads["shortcut"]["kernel"] = grad
    d, a = through_norm("conv3", g), _activate(tree, kept, "conv2")
    grads["conv3"]["kernel"] = _multiply(a.reshape(-1, block.mid), d, dtype, (0, 0))
    d = _multiply(d, tree["conv3"]["kernel"], dtype, (1, 1)).reshape(a.shape)
    d = through_norm("conv2", jnp.where(a > 0, d, 0)).reshape(-1, *side, block.mid)
    a = _activate(tree, kept, "conv1")
    image = a.reshape(-1, *side, block.mid)
    d, grads["conv2"]["kernel"] = _convolve_gradient(image, tree["conv2"]["kernel"], d, dtype)
    d = through_norm("conv1", jnp.where(a > 0, d.reshape(a.shape), 0))
    grads["conv1"]["kernel"] = _multiply(x, d, dtype, (0, 0))
    return grads, extra
