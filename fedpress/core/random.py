"""Randomness as keys: a seed and some words name one stream, so nothing depends on the order of calls.

The streams themselves are in `random_source`.
"""

from __future__ import annotations

import json
from hashlib import blake2b, shake_256
from operator import index
from typing import TYPE_CHECKING

from fedpress.core.canonical import canonical

if TYPE_CHECKING:
    import numpy as np

STREAMS = 2
"""Version of all streams. Whoever changes what is drawn under a name counts it up: a run must not go on with others.

1 (fedpress 0.1.0): torch's Mersenne Twister. 2: Philox for what is public, AES for what privacy rests on.
"""


def derive(seed: int, *words: str | int) -> int:
    """Returns the 63-bit seed of the stream named by `words` under `seed`; numpy's words count by their value.

    >>> derive(1, "round", 2) == derive(1, "round", 2)
    True
    >>> derive(1, "a", "bc") == derive(1, "ab", "c")
    False
    """
    return int.from_bytes(blake2b(name_of(seed, words), digest_size=8).digest(), "little") >> 1


def secret_key(seed: int, *words: str | int) -> bytes:
    """Returns the 32-byte key of the stream named by `words` under `seed`, for `keystream`.

    It is as secret as `seed` is: with 256 random bits as seed nobody can guess it.

    >>> secret_key(1, "a") == secret_key(1, "a"), len(secret_key(1, "a"))
    (True, 32)
    """
    return shake_256(b"key" + name_of(seed, words)).digest(32)


def keystream(key: bytes, size: int, *, start: int = 0) -> np.ndarray:
    """Returns `size` bytes (uint8) of the AES-256-CTR stream of the 32-byte `key`, from byte `start` on.

    `start` must be a multiple of 16, the block of AES. A cryptographic generator: about 2 GB a second with AES-NI.

    >>> keystream(bytes(32), 4).tolist()
    [220, 149, 192, 120]
    """
    import numpy as np
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if start % 16:
        raise ValueError(f"start: got {start}, expected a multiple of 16")
    out = np.empty(size + 15, np.uint8)  # the cipher wants room for one more block
    encryptor = Cipher(
        algorithms.AES(key), modes.CTR((start // 16).to_bytes(16, "big"))
    ).encryptor()
    chunk = bytes(min(size, 1 << 20))
    for at in range(0, size, 1 << 20):
        part = chunk[: min(len(chunk), size - at)]
        encryptor.update_into(part, memoryview(out)[at:])  # type: ignore[arg-type]
    return out[:size]


def fingerprint(*parts: object) -> str:
    """Returns a 256-bit digest of `parts`: tensors by type, shape and bytes, the rest in canonical JSON.

    Of inputs by name the names and tensors count, in whatever order they stand.

    Raises:
        TypeError: if a part is neither; what Python itself says of an object may change with a version.

    >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("ab") == fingerprint("a", "b")
    (True, False)
    """
    import torch

    from fedpress.core.inputs import NamedInputs

    digest = blake2b(digest_size=32)

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
            digest.update(flat.numpy().data)
        elif isinstance(part, NamedInputs):
            add(sorted(part))
            for name in sorted(part):
                add(part[name])
        else:
            text = json.dumps(canonical(part), sort_keys=True).encode()
            digest.update(f"{len(text)};".encode() + text)

    for part in parts:
        add(part)
    return digest.hexdigest()


def name_of(seed: int, words: tuple[str | int, ...]) -> bytes:
    """Returns the bytes that name a stream; two names are the same only if all words and their types are.

    >>> name_of(1, ("a", 2))
    b'[1, "a", 2]'
    """
    # `index` takes whole numbers of every library and no others: 1.5 would be cut to the stream of 1.
    plain = [str(word) if isinstance(word, str) else index(word) for word in words]
    return json.dumps([index(seed), *plain]).encode()
