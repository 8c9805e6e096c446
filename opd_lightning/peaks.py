"""Peaks: operations a second that devices can do in 16 bits, by their data sheets."""

from __future__ import annotations

import re

import torch

PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s of dense products in bf16 with sums in float32, by words of the device's name, of which the first counts."""


def peak_of(device: torch.device, precision: str) -> float | None:
    """Returns the operations a second that a device can do; None where no table has it, as for CPUs and float32."""
    if device.type != "cuda" or "16" not in precision:
        return None
    return peak_named(torch.cuda.get_device_name(device))


def peak_named(name: str) -> float | None:
    """Finds the peak of a device by its name; None: nobody knows."""
    if "Laptop" in name:  # another chip under the same name
        return None
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
