"""The table of functions that compute a client's gradients, by the kind of privacy."""

from collections.abc import Mapping

from fedpress.federation.local import GradientSource, plain_steps
from fedpress.federation.private import joint_steps, private_steps

GRADIENT_SOURCES: Mapping[str, GradientSource] = {
    "plain": plain_steps,
    "private": private_steps,
    "joint": joint_steps,
}
"""Value of `Trust.steps` -> function. On a device `ondevice.device_steps` replaces "plain"."""
