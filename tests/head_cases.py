"""Small heads for tests: specs, features, and torch heads with their weights in our trees."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import torch
from torch_heads import TorchHead

from satdifuser_jax.convert_heads import load_head
from satdifuser_jax.heads import HeadSpec
from satdifuser_jax.taps import Scale

# Two widths in the finest scale, and a scale as wide as the projection (identity shortcuts).
SCALES = (Scale(6, ("a", "b", "c"), (12, 12, 20)), Scale(3, ("d",), (32,)))
SPEC = HeadSpec(
    task="classification",
    fuser="gw",
    num_classes=4,
    scales=SCALES,
    num_keys=2,
    projection_dim=32,
    norm_groups=4,
    num_experts=3,
    channels=8,
    pool_scales=(1, 2, 6),
    output_side=10,
)


def make_spec(**changes) -> HeadSpec:
    return dataclasses.replace(SPEC, **changes)


def make_features(spec: HeadSpec, batch: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(batch, spec.num_keys, s.side, s.side, sum(s.channels)) for s in spec.scales]
    return tuple(rng.standard_normal(shape, np.float32) + 0.3 for shape in shapes)


def make_torch_head(spec: HeadSpec, seed: int = 0) -> TorchHead:
    """In evaluation mode; every norm, bias and mixing weight off its initial value."""
    torch.manual_seed(seed)
    head = TorchHead(spec).eval()
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.ndim < 2 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return head


def port_head(head: TorchHead, spec: HeadSpec, folder) -> tuple[dict, dict]:
    """(params, state) of a torch head."""
    content = io.BytesIO()
    torch.save(head.published_state(), content)
    path = folder / "head.pth"
    path.write_bytes(content.getvalue())
    return load_head(path, spec)


def port_gradients(head: TorchHead, spec: HeadSpec, folder) -> dict:
    """Gradients of a torch head as a tree of ours."""
    state = head.published_state()
    for name, parameter in head.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        state[name.split(".", 1)[1]] = grad
    content = io.BytesIO()
    torch.save(state, content)
    path = folder / "gradients.pth"
    path.write_bytes(content.getvalue())
    return load_head(path, spec)[0]
