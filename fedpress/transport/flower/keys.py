"""Public keys of clients, in the form by which Flower identifies them as nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import (
    public_key_to_bytes,
)

from fedpress.errors import NetworkError


@contextmanager
def registered_before() -> Iterator[None]:
    """Ignores the error in the block that a key is already registered at the SuperLink."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if "already in use" not in error.response.text:
            raise


def node_key(openssh: str) -> bytes:
    """Converts a client's public key to the bytes by which Flower identifies the client.

    Args:
        openssh: the public key as OpenSSH text, the content of `node.pub`.

    Raises:
        NetworkError: if it is no elliptic-curve key in OpenSSH's format.
    """
    try:
        key = serialization.load_ssh_public_key(openssh.encode())
    except (ValueError, TypeError) as error:
        raise NetworkError(
            f"not a public key in OpenSSH's format ({error})",
            place=openssh[:60],
            cure="take the content of node.pub, which fedpress network init wrote",
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NetworkError(
            "not a key on an elliptic curve", place=openssh[:60], cure="take a P-384 key"
        )
    return public_key_to_bytes(key)
