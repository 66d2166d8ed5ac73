"""The system calls that a program in the sandbox may make, as a seccomp filter; every other call fails with EPERM.

What is left can compute, wait, use its open descriptors and make threads.  It can neither open, look for nor change a
file, nor make a process, socket, pipe, shared memory or executable page, nor signal or trace anybody.

Sources: Linux `man 2 seccomp`; `include/uapi/linux/{seccomp,filter,audit}.h`; numbers from `arch/x86/entry/syscalls/
syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

from __future__ import annotations

import errno
import platform
import struct

AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's names of the architectures whose numbers stand below."""

# fmt: off
NUMBERS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17,
        "readv": 19, "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33,
        "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "clone": 56, "exit": 60,
        "fcntl": 72, "getcwd": 79, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "times": 100, "getuid": 102,
        "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115,
        "getresuid": 118, "getresgid": 120, "rt_sigpending": 127, "sigaltstack": 131, "gettid": 186, "time": 201,
        "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292,
        "prlimit64": 302, "getrandom": 318, "membarrier": 324, "rseq": 334, "clone3": 435,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "close": 57, "lseek": 62, "read": 63,
        "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "fstat": 80, "exit": 93,
        "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigpending": 136, "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153, "getgroups": 158,
        "getrlimit": 163, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174,
        "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216,
        "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233, "prlimit64": 261, "getrandom": 278,
        "membarrier": 283, "rseq": 293, "clone3": 435,
    },
}
# fmt: on

_LOAD, _AND, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000

_THREAD_FLAGS = 0x007D0F00  # all flags that C libraries make threads with
_THREAD_NEEDS = 0x00010F00  # VM, FS, FILES, SIGHAND and THREAD: without one of them it is a process
_EXECUTABLE = 0x4
_ASK_TERMINAL = 0x5401
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 1030)  # DUPFD, GETFD, SETFD, GETFL, DUPFD_CLOEXEC; SETOWN would direct signals
_FUTEX_OPERATIONS = (0, 1, 3, 4, 5, 9, 10)  # wait, wake and requeue; none that lends priorities
_FUTEX_FLAGS = 0x180  # private, real-time clock
_X32 = 0x40000000

Instruction = tuple[int, int, int, int]


def supported() -> bool:
    """Whether this machine's numbers are known."""
    return platform.system() == "Linux" and platform.machine() in NUMBERS


def filter_program(machine: str) -> bytes:
    """The filter of a machine ("x86_64" or "aarch64") in classic BPF, 8 bytes per instruction."""
    numbers = NUMBERS[machine]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the same registers read as another ABI
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    by_argument = {
        "clone": _thread_only(),
        "clone3": [_fail(errno.ENOSYS)],  # its flags lie in memory, which no filter reads; libraries then use clone
        "ioctl": _one_of(1, (_ASK_TERMINAL,), errno.ENOTTY),
        "fcntl": _one_of(1, _DESCRIPTOR_COMMANDS, errno.EPERM),
        "futex": _one_of(1, _FUTEX_OPERATIONS, errno.ENOSYS, ignored=_FUTEX_FLAGS),
        "mmap": _without_bits(2, _EXECUTABLE),
        "mprotect": _without_bits(2, _EXECUTABLE),
        "prlimit64": _zero_words(_argument(0), _argument(2), _argument(2) + 4),  # its own limits, to read
    }
    for name, number in numbers.items():
        body = by_argument.get(name, [(_RETURN, 0, 0, _ALLOW)])
        program += [(_EQUAL, 0, len(body), number), *body]
    program.append(_fail(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _argument(index: int) -> int:
    """Where the lower half of an argument lies; the kernel reads no more of those that are looked at."""
    return 16 + 8 * index


def _fail(number: int) -> Instruction:
    return (_RETURN, 0, 0, _FAIL | number)


def _thread_only() -> list[Instruction]:
    return [
        (_LOAD, 0, 0, _argument(0)),
        (_ANY_BIT, 3, 0, ~_THREAD_FLAGS & 0xFFFFFFFF),
        (_AND, 0, 0, _THREAD_NEEDS),
        (_EQUAL, 0, 1, _THREAD_NEEDS),
        (_RETURN, 0, 0, _ALLOW),
        _fail(errno.EPERM),
    ]


def _one_of(index: int, values: tuple[int, ...], otherwise: int, ignored: int = 0) -> list[Instruction]:
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    load = [(_LOAD, 0, 0, _argument(index)), (_AND, 0, 0, ~ignored & 0xFFFFFFFF)]
    return [*load, *tests, _fail(otherwise), (_RETURN, 0, 0, _ALLOW)]


def _without_bits(index: int, bits: int) -> list[Instruction]:
    return [(_LOAD, 0, 0, _argument(index)), (_ANY_BIT, 0, 1, bits), _fail(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _zero_words(*words: int) -> list[Instruction]:
    tests = []
    for i, word in enumerate(words):
        tests += [(_LOAD, 0, 0, word), (_EQUAL, 0, 2 * (len(words) - i) - 1, 0)]
    return [*tests, (_RETURN, 0, 0, _ALLOW), _fail(errno.EPERM)]
