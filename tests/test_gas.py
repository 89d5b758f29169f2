"""Chips, the gas line, measured power."""

import pytest

from train import chips, cost

NAMES = ("v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "a100-80gb", "h100", "h200", "b200", "l4")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_chip_has_its_range_and_source(name):
    chip = chips.find(name)
    for number in filter(lambda x: isinstance(x, chips.Number), (*chip, *chips.site())):
        assert number.low <= number.value <= number.high and number.low > 0
        assert number.quality in ("published", "derived", "estimate") and number.source
        assert number.date.startswith("2026-")
    watts = chip.watts
    assert watts.low < watts.high  # no chip here has one published average of its whole system


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
     ("TPU7x", "tpu7x"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("V6E", "v6e")],
)  # fmt: skip
def test_device_kinds_are_found(kind, name):
    assert chips.find(kind).name == name


def test_unknown_chips_are_no_guess():
    assert chips.find("cpu") is None and chips.find("NVIDIA H100 PCIe") is None and chips.find("") is None
    assert cost.mfu(1e12, None, 1) is None


def test_mfu_by_hand():
    assert cost.mfu(0.5 * 918e12 * 8, chips.find("v6e"), 8) == pytest.approx(0.5)
    assert cost.mfu(0.5 * 2307e12 * 4, chips.find("tpu7x"), 8) == pytest.approx(0.5)  # 8 devices are 4 chips
