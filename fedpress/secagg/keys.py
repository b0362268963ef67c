"""Keys: all that a client encrypts or signs with is derived from its one 32-byte secret."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Item: TypeAlias = str | int | bytes
SIGNATURE = 64
"""Bytes of an Ed25519 signature."""

NONCE = 12
"""Bytes of a ChaCha20-Poly1305 nonce."""

TAG = 16
"""Bytes that ChaCha20-Poly1305 adds, by which a change is noticed."""


def derive(key: bytes, *items: Item, size: int = 32) -> bytes:
    """Returns `size` bytes derived from `key` under the name `items` (HKDF with SHA-256).

    Different items give unrelated bytes; so do a text and the same bytes.

    >>> derive(bytes(32), "a") == derive(bytes(32), "a")
    True
    >>> derive(bytes(32), "a") == derive(bytes(32), b"a")
    False
    """
    return HKDF(SHA256(), size, None, _statement(items)).derive(key)


def digest(*items: Item) -> bytes:
    """Returns the 32-byte digest (BLAKE2b) of `items`; different lists have different digests."""
    return digest_all(items)


def digest_all(items: Iterable[Item | np.ndarray]) -> bytes:
    """Returns the digest of items that may be large contiguous arrays, without copying these."""
    hasher = blake2b(digest_size=32)
    for item in items:
        # Type and length stand before each item: ("ab", "c") and ("a", "bc") must differ.
        if isinstance(item, np.ndarray):
            hasher.update(f"{item.dtype.str} {item.shape};".encode())
            hasher.update(item.data)
        else:
            data = item if isinstance(item, bytes) else repr(item).encode()
            hasher.update(f"{type(item).__name__} {len(data)};".encode() + data)
    return hasher.digest()


def identity(secret: bytes) -> bytes:
    """Returns the public Ed25519 key [32] by which others know the holder of `secret`.

    The others must get it before the run, and not from a server that they do not trust.
    """
    return _signer(secret).public_key().public_bytes_raw()


def sign(secret: bytes, *items: Item) -> bytes:
    """Returns the signature [64] of `items` by the holder of `secret`."""
    return _signer(secret).sign(_statement(items))


def verify(public: bytes, signature: bytes, *items: Item) -> bool:
    """Says whether `signature` on `items` is by the holder of the identity `public`.

    Any bytes may be given; those that are no key or no signature give False.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _statement(items))
    # A ValueError: `public` is no key.
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyPair:
    """The X25519 key of one client for one run: a new run has a new key."""

    def __init__(self, secret: bytes, run: str) -> None:
        self._private = X25519PrivateKey.from_private_bytes(derive(secret, "agreement", run))
        self.public = self._private.public_key().public_bytes_raw()

    def shared_secret(self, public: bytes) -> bytes | None:
        """Returns the 32 bytes that only this client and the holder of `public` can compute.

        None if `public` is a point of low order, for which anyone could compute them.
        """
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return None
        # Sorted, so that both sides derive the same secret from the two keys.
        return derive(shared, "pair", *sorted((self.public, public)))


def can_agree(public: bytes) -> bool:
    """Says whether a secret can be agreed on with the holder of `public`.

    A point of low order gives zero with every private key, since X25519 keys are multiples of 8
    (RFC 7748, section 6.1). So one trial with any key shows it, and no secrets need to be computed.

    >>> can_agree(bytes(32)), can_agree(KeyPair(bytes(32), "run").public)
    (False, True)
    """
    try:
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        return False
    return True


def seal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes:
    """Encrypts and authenticates `data`; the result is `TAG` bytes longer.

    Args:
        key: 32 bytes.
        nonce: 12 bytes, never used twice with one key for different data.
        data: what is encrypted.
        about: what is authenticated with it, and must be given again to `unseal`.
    """
    return ChaCha20Poly1305(key).encrypt(nonce, data, about)


def unseal(key: bytes, nonce: bytes, data: bytes, about: bytes) -> bytes | None:
    """Returns what was sealed; None if it was changed, or key, nonce or `about` are others."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, data, about)
    except InvalidTag:
        return None


def _signer(secret: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(derive(secret, "identity"))


def _statement(items: tuple[Item, ...]) -> bytes:
    # `repr` writes a text and the same bytes differently, and quotes keep items apart. The first
    # item keeps signatures apart from those of other protocols.
    return repr(("fedpress secure 1", *items)).encode()
