"""The frequency of this host's time-stamp counter, which a guest under emulation must be told."""

import ctypes
import functools
import mmap
import time

# mov eax,edx:eax of rdtsc into rax: rdtsc; shl rdx,32; or rax,rdx; ret
_RDTSC = bytes.fromhex("0f3148c1e2204809d0c3")


@functools.cache
def tsc_khz() -> int:
    """Kilohertz of the host's TSC, measured once over 50 ms against the monotonic clock.

    /proc/cpuinfo shows the core's momentary clock, which is another number on bare metal.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC)
        anchor = ctypes.c_char.from_buffer(page)
        rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        ticks, nanoseconds = rdtsc(), time.monotonic_ns()  # once for nothing: the first calls are slow
        ticks, nanoseconds = rdtsc(), time.monotonic_ns()
        time.sleep(0.05)
        ticks, nanoseconds = rdtsc() - ticks, time.monotonic_ns() - nanoseconds
        del rdtsc, anchor
    return round(ticks * 1_000_000 / nanoseconds)
