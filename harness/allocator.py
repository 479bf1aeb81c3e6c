"""How this process holds memory: freed arrays are kept for the next ones.

A walk makes and drops arrays of a few megabytes thousands of times. By default the C library maps
each anew, and the kernel clears every page of it: a third of the time of a check.
"""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>: names of mallopt's parameters.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that glibc takes on a 64-bit machine; larger arrays are weights, and go back when freed.
_LARGEST_KEPT = 32 << 20
_KEPT_IN_ALL = 512 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory; return whether it understood.

    Only glibc does. Says nothing elsewhere: it is about time, never about results.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(
        library.mallopt(name, value) == 1
        for name, value in ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, _KEPT_IN_ALL))
    )
