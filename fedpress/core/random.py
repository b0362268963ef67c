"""Derives the seed or key of a random stream from the run's seed and the stream's name.

Example: `derive(seed, "round", 3)` is the seed of a stream named ("round", 3). The seed does not
depend on what was drawn before. The streams themselves are in `random_source`.
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
"""Version of all streams. Increase it when a change of the code changes the numbers of any stream.

A run can be resumed only with the version with which it began. Version 1 (fedpress 0.1.0): torch's
Mersenne Twister. Version 2: Philox for public draws, AES for noise and keys.
"""


def derive(seed: int, *words: str | int) -> int:
    """Returns the 63-bit seed of the stream named by `words` under `seed`.

    >>> derive(1, "round", 2) == derive(1, "round", 2)
    True
    >>> derive(1, "a", "bc") == derive(1, "ab", "c")
    False
    """
    digest = blake2b(stream_name(seed, words), digest_size=8).digest()
    # 63 bits, so that the seed fits a signed 64-bit integer.
    return int.from_bytes(digest, "little") >> 1


def secret_key(seed: int, *words: str | int) -> bytes:
    """Returns the 32-byte key of the stream named by `words` under `seed`, for `keystream`.

    It is as secret as `seed`: with a seed of 256 random bits nobody can guess it.

    >>> secret_key(1, "a") == secret_key(1, "a"), len(secret_key(1, "a"))
    (True, 32)
    """
    return shake_256(b"key" + stream_name(seed, words)).digest(32)


def keystream(key: bytes, size: int, *, start: int = 0) -> np.ndarray:
    """Returns `size` bytes (uint8) of the AES-256-CTR stream of the 32-byte `key`.

    The first of them is byte `start` of the stream. It is a cryptographic generator. With
    AES-NI (processor instructions) it makes about 2 GB a second.

    Raises:
        ValueError: if `start` is no multiple of 16, the block size of AES.

    >>> keystream(bytes(32), 4).tolist()
    [220, 149, 192, 120]
    """
    import numpy as np
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if start % 16:
        raise ValueError(f"start: got {start}, expected a multiple of 16")
    # `update_into` needs a buffer that is 15 bytes longer than the data (a block less one byte).
    out = np.empty(size + 15, np.uint8)
    counter = (start // 16).to_bytes(16, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    # Encrypting zeros gives the stream itself. The zeros are given in chunks, to save memory.
    chunk = bytes(min(size, 1 << 20))
    for at in range(0, size, 1 << 20):
        part = chunk[: min(len(chunk), size - at)]
        encryptor.update_into(part, memoryview(out)[at:])  # type: ignore[arg-type]
    return out[:size]


def fingerprint(*parts: object) -> str:
    """Returns a 256-bit digest of `parts`, in hex.

    A tensor is hashed by dtype, shape and bytes, `NamedInputs` by sorted names and tensors, and any
    other value by its canonical JSON (see `core.canonical`).

    Raises:
        TypeError: if a value has no canonical JSON. Its `repr` is not hashed instead,
            because it may differ between versions of a library.

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
            # The length comes first, so that ("ab",) and ("a", "b") differ.
            digest.update(f"{len(text)};".encode() + text)

    for part in parts:
        add(part)
    return digest.hexdigest()


def stream_name(seed: int, words: tuple[str | int, ...]) -> bytes:
    """Returns the name of a stream as bytes; ("a", 2) and ("a", "2") have different names.

    >>> stream_name(1, ("a", 2))
    b'[1, "a", 2]'
    """
    # `index` takes integers of every library and refuses floats: int(1.5) would be 1.
    plain: list[str | int] = []
    for word in words:
        plain.append(str(word) if isinstance(word, str) else index(word))
    return json.dumps([index(seed), *plain]).encode()
