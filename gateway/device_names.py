"""What `--training-devices` may name."""

from __future__ import annotations

AUTO, NO_DEVICE = "auto", "none"
"""In place of devices."""


def checked(value: list[str]) -> list[str]:
    """The same; none at all are as good as auto. Raises ValueError for what cannot be meant."""
    if not value:
        return [AUTO]
    if len(value) == 1 and value[0] in (AUTO, NO_DEVICE):
        return value
    for device in value:
        if device in (AUTO, NO_DEVICE):
            raise ValueError(f"{device} stands alone; leave it out, or the others")
        if device != "cpu" and not (device.isascii() and device.isdecimal()):
            raise ValueError(f"{device!r} is neither cpu nor the number of a GPU")
    if len(set(value)) != len(value):
        raise ValueError("names a device twice; give each once")
    return value
