"""The system call filter, run instruction by instruction: what it answers for every call."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core import seccomp

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, KILL = 0x7FFF0000, 0x80000000
ADDRESS = 0x1234_5678_9000
PROGRAM = list(struct.iter_unpack("=HBBI", seccomp.program(ADDRESS)))


def answer(number: int, *arguments: int, arch: int = X86_64) -> int:
    """What a kernel would return for this call."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = PROGRAM[at]
        at += 1
        match code:
            case 0x20:
                accumulator = struct.unpack_from("=I", data, value)[0]
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x45:
                at += if_true if accumulator & value else if_false
            case 0x06:
                return value
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def error(number: int) -> int:
    return 0x00050000 | number


def test_it_fits_the_kernel() -> None:
    assert len(PROGRAM) < 4096  # BPF_MAXINSNS


def test_calls_a_vmm_needs_are_allowed() -> None:
    for number in (0, 1, 9, 10, 17, 18, 202, 232, 257, 271, 281, 296, 317, 318):
        assert answer(number) == ALLOW, number


@given(st.integers(0, 0x3FFFFFFF))
def test_what_is_not_listed_does_not_exist(number: int) -> None:
    listed = {
        *seccomp._ALLOWED.values(),
        *seccomp._REFUSED.values(),
        *seccomp._FATAL.values(),
        59,
        56,
        157,
        16,
    }
    if number not in listed:
        assert answer(number) == error(errno.ENOSYS)


def test_no_call_is_in_two_lists() -> None:
    numbers = [
        *seccomp._ALLOWED.values(),
        *seccomp._REFUSED.values(),
        *seccomp._FATAL.values(),
        59,
        56,
        157,
        16,
    ]
    assert len(numbers) == len(set(numbers))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_another_architecture_is_fatal(number: int, arch: int) -> None:
    if arch != X86_64:
        assert answer(number, arch=arch) == KILL
    assert answer(number, arch=I386) == KILL


@given(st.integers(0x40000000, 2**32 - 1))
def test_x32_is_fatal(number: int) -> None:
    assert answer(number) == KILL


@given(st.integers(0, 2**64 - 1))
def test_exec_works_from_one_address_only(address: int) -> None:
    assert answer(59, ADDRESS) == ALLOW
    assert answer(59, address) == (ALLOW if address == ADDRESS else KILL)
    assert answer(59, ADDRESS ^ (1 << (address % 64))) == KILL


@given(st.integers(0, 2**32 - 1))
def test_clone_makes_threads_only(flags: int) -> None:
    assert answer(56, flags) == (ALLOW if flags & 0x10000 else error(errno.EPERM))


@pytest.mark.parametrize("number", [41, 42, 49, 53])
def test_no_socket_is_made_or_connected(number: int) -> None:
    assert answer(number) == error(errno.EACCES)


@given(st.integers(0, 2**32 - 1))
def test_prctl_does_little(option: int) -> None:
    allowed = option in (15, 16, 21, 22, 29, 33, 38, 0x53564D41)
    assert answer(157, option) == (ALLOW if allowed else error(errno.EPERM))
    assert answer(157, 22) == answer(157, 38) == ALLOW, "QEMU's own sandbox"


def test_terminals_are_not_typed_into() -> None:
    assert answer(16, 3, 0x5412) == answer(16, 3, 0x541C) == error(errno.EPERM)
    assert answer(16, 3, 0xAE80) == ALLOW, "KVM_RUN"


def test_every_number_is_the_one_the_kernel_uses() -> None:
    header = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    try:
        with open(header) as file:
            real = {
                line.split()[1]: int(line.split()[2]) for line in file if line.startswith("#define __NR_")
            }
    except FileNotFoundError:
        pytest.skip("no kernel headers here")
    for name, number in {**seccomp._ALLOWED, **seccomp._REFUSED, **seccomp._FATAL}.items():
        assert real[f"__NR_{name}"] == number
