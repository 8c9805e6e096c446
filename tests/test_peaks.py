"""Peaks are found by the name that the driver gives a device, or not at all."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.peaks import PEAKS, peak_named, peak_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some Other GPU", None),
    ],
)
def test_a_device_is_known_by_its_name(name, peak):
    assert peak_named(name) == peak


def test_every_entry_is_found_by_its_own_words():
    assert {words: peak_named(f"NVIDIA {words}") for words in PEAKS} == PEAKS


def test_of_a_cpu_and_in_float32_nothing_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_of(torch.device("cpu"), "bf16-mixed") is None
    assert peak_of(torch.device("cuda"), "32-true") is None
    assert peak_of(torch.device("cuda"), "bf16-mixed") == 989e12
