"""What the kernels for GPUs and TPUs share."""

from typing import Any

FAR = 1e9
"""A place, or an order, behind all others. -FAR is a similarity below all others."""
TINY = 1e-38
"""The least square of a norm by which a kernel divides."""

Ref = Any
"""A reference to memory of the device, as Pallas passes it to a kernel."""
