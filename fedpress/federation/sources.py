"""The sources of gradients, a table: which one a client's steps come from follows from the trust."""

from collections.abc import Mapping

from fedpress.federation.local import GradientSource, plain_steps
from fedpress.federation.private import joint_steps, private_steps

GRADIENT_SOURCES: Mapping[str, GradientSource] = {
    "plain": plain_steps,
    "private": private_steps,
    "joint": joint_steps,
}
"""By `Trust.steps`. A device program is a source of its own (`ondevice.device_steps`), in place of "plain"."""
