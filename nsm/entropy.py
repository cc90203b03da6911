"""Randomness of the NSM for the kernel's pool: an enclave has few sources of its own, and its
parent knows them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Final

RANDOM: Final = "/dev/random"
RNDADDENTROPY: Final = 0x40085203  # _IOW('R', 0x03, int[2]) of linux/random.h


def mix_into_kernel(randomness: bytes) -> bool:
    """Mix bytes into the kernel's pool; return whether they were also credited as entropy.

    A plain write mixes and needs no privilege. Credit (which does) is given only to a pool that is
    not initialised yet: there, getrandom would otherwise block the key generation for as long as
    the parent likes. A missing node or a missing privilege is no error: the pool is then as good as
    it was.
    """
    with contextlib.suppress(OSError):
        pool = os.open(RANDOM, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(pool, randomness)
            if not _initialised():
                # struct rand_pool_info {int entropy_count (bits); int buf_size; __u32 buf[];}
                fcntl.ioctl(
                    pool,
                    RNDADDENTROPY,
                    struct.pack("ii", 8 * len(randomness), len(randomness)) + randomness,
                )
                return True
        finally:
            os.close(pool)
    return False


def _initialised() -> bool:
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return False
    return True
