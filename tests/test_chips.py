"""Figures of accelerators: the names JAX gives devices find them, and nothing is guessed."""

import pytest

from common_jax.chips import CHIPS, GIB, find_chip, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_a_device_kind_finds_its_chip(kind, name):
    assert find_chip(kind).name == name
    assert peak_flops(kind) == CHIPS[name].flops


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v5 lit", "NVIDIA H200 MIG 1g.18gb", "H100 PCIe"])
def test_an_unknown_kind_has_no_peak(kind):
    assert peak_flops(kind) is None


def test_no_kind_names_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_figures_are_in_bytes_and_operations_a_second():
    for chip in CHIPS.values():
        assert 8 * GIB < chip.hbm < 256 * GIB
        assert 1e14 < chip.flops < 2e15
        # A chip needs 100 to 1000 operations a byte to be busy; a slip of a unit leaves that.
        assert 100 < chip.flops / chip.hbm_bandwidth < 1000
        assert 4 < chip.hbm_bandwidth / chip.link_bandwidth < 30
