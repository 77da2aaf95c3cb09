"""What loading and computing take on a device, by its profile: a roofline."""

from __future__ import annotations

from toolchain.formats.device import Device


def compute_seconds(
    device: Device, flops: float, moved_bytes: float, precision: str, engine: str | None = None
) -> float:
    """Seconds of a call: max(flops / throughput, bytes / memory bandwidth) + overhead (a roofline).

    Args:
        flops: operations, a multiplication and an addition counted as two.
        moved_bytes: weights and activations read and written.
        engine: which one computes; the fastest for the precision by default.

    Raises:
        RecipeError: the profile has no throughput for that precision and engine.
    """
    computing = flops / device.flops_per_s(precision, engine)
    moving = moved_bytes / device.memory_bytes_per_s.value
    return max(computing, moving) + device.call_overhead_s.value


def load_seconds(device: Device, weight_bytes: int) -> float:
    """Seconds of a load, from storage until the block can run."""
    return weight_bytes / device.load_bytes_per_s.value + device.load_overhead_s.value
