"""The table of gradient sources: plain gradients, DP-SGD, or one clipped sum of gradients."""

from collections.abc import Mapping

from fedpress.federation.local import GradientSource, plain_steps
from fedpress.federation.private import joint_steps, private_steps

GRADIENT_SOURCES: Mapping[str, GradientSource] = {
    "plain": plain_steps,
    "private": private_steps,
    "joint": joint_steps,
}
"""Keyed by `Trust.steps`. On a device `ondevice.device_steps` replaces "plain"."""
