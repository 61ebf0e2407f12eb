"""Public figures of the accelerators that runs are planned for and measured against.

TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications". GPU: NVIDIA's data sheets of
A100, H100 and H200, SXM boards; peaks are those of dense matrices, half of what is printed for
sparse ones. The network figures there count both directions; here they count one.

Memory of a GPU is what CUDA has for programs, a little less than the name says: PyTorch tells
39.4, 79.2, 79.1 and 139.8 GiB.

Between slices or hosts, a chip's share of its host's network cards, one direction: v5e 2 x 100
Gbit/s for 8 chips, v6e 4 x 200 for 8, v5p 50 Gbit/s a chip (the same pages); no figure is printed
for v4, for which that of v5e is assumed. GPUs: a card each, 200 Gbit/s (DGX A100), 400 (DGX H100
and H200).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator as JAX counts devices.

    hbm: bytes. flops: bfloat16 operations a second. hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that leave by one link. torus: dimensions of the network, each
    with two links a chip; 0 is a switch, with one link a chip. wraps_from: shortest torus dimension
    that closes to a ring (three dimensions: only if all are multiples of it). dcn_bandwidth: bytes
    a second that leave for other slices. kinds: its names as `jax.Device.device_kind`.
    """

    name: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    wraps_from: int
    dcn_bandwidth: float
    kinds: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1.2e12, 50e9, 3, 4, 3.125e9, ("TPU v4",)),
        Chip("v5e", 16 * GIB, 197e12, 0.819e12, 50e9, 2, 16, 3.125e9, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 95 * GIB, 459e12, 2.765e12, 100e9, 3, 4, 6.25e9, ("TPU v5", "TPU v5p")),
        Chip("v6e", 32 * GIB, 918e12, 1.638e12, 100e9, 2, 16, 12.5e9, ("TPU v6 lite", "TPU v6e")),
        Chip(
            "A100-40", 39.4 * GIB, 312e12, 1.555e12, 300e9, 0, 0, 25e9, ("NVIDIA A100-SXM4-40GB",)
        ),
        Chip("A100", 79.2 * GIB, 312e12, 2.039e12, 300e9, 0, 0, 25e9, ("NVIDIA A100-SXM4-80GB",)),
        Chip("H100", 79.1 * GIB, 989e12, 3.35e12, 450e9, 0, 0, 50e9, ("NVIDIA H100 80GB HBM3",)),
        Chip("H200", 139.8 * GIB, 989e12, 4.8e12, 450e9, 0, 0, 50e9, ("NVIDIA H200",)),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """Chip of `jax.Device.device_kind`; None when unknown, also for a part (MIG) of a known one."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations a second at the peak of one device; None for an unknown kind."""
    chip = find_chip(device_kind)
    return chip.flops if chip else None
