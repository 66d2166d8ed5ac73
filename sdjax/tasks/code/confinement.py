"""How a process locks itself in, for good: no new privileges, Landlock, seccomp, resource limits, an end with its parent.

None of it needs a privilege.  The fork server and its children run this; it imports the standard library and its
neighbour only, never an accelerator's.

Sources: Linux `man 7 landlock`, `man 2 prctl`, `man 2 capset`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct

from sdjax.tasks.code.system_calls import filter_program, supported

NOBODY = 65534

_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT, _LANDLOCK_VERSION = 444, 446, 1
_CAPABILITIES_SET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_VERSION = 0x20080522
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # by version of Landlock; from 5 on also device controls
_ALL_FILE_RIGHTS = 0xFFFF

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, more: int = 0) -> None:
    arguments = (ctypes.c_ulong(value), ctypes.c_ulong(more), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if _libc.prctl(option, *arguments):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


class Filter:
    """The seccomp filter, made once before the forks."""

    def __init__(self) -> None:
        self._code = filter_program(platform.machine())
        self._buffer = ctypes.create_string_buffer(self._code, len(self._code))
        header = struct.pack("@HP", len(self._code) // 8, ctypes.addressof(self._buffer))
        self._program = ctypes.create_string_buffer(header, len(header))

    def install(self) -> None:
        """From here on this process makes no call that the filter does not let through."""
        _prctl(_SET_SECCOMP, 2, ctypes.addressof(self._program))


def can_filter() -> bool:
    """Whether this kernel takes a seccomp filter: tried by a child, which it would bind for good."""
    if not supported():
        return False
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            Filter().install()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def landlock() -> int:
    """Denies this process every file, and TCP, signals and abstract sockets where the kernel can; 0 without Landlock.

    Returns the kernel's version of Landlock.  A second call binds this process apart from its parent.
    """
    if platform.system() != "Linux":
        return 0
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_LANDLOCK_VERSION))
    if version < 1:
        return 0
    handled = [_FILE_RIGHTS.get(version, _ALL_FILE_RIGHTS)]
    handled += [0x3] if version >= 4 else []  # bind and connect over TCP
    handled += [0x3] if version >= 6 else []  # abstract sockets and signals
    rules = ctypes.create_string_buffer(struct.pack(f"={len(handled)}Q", *handled), 8 * len(handled))
    descriptor = _libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(8 * len(handled)), ctypes.c_uint(0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    if _libc.syscall(_LANDLOCK_RESTRICT, descriptor, ctypes.c_uint(0)):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(descriptor)
    return version


def give_up_privileges() -> None:
    """Root becomes nobody where it may, and keeps no capability where it may not; nobody gains any by exec."""
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # a user namespace that maps root alone, or root without capabilities
            os.setgroups([])
        with contextlib.suppress(OSError):
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if platform.system() != "Linux":
        return
    if platform.machine() in _CAPABILITIES_SET:
        header, none = struct.pack("=Ii", _CAPABILITIES_VERSION, 0), struct.pack("=6I", 0, 0, 0, 0, 0, 0)
        if _libc.syscall(_CAPABILITIES_SET[platform.machine()], ctypes.c_char_p(header), ctypes.c_char_p(none)):
            raise OSError(ctypes.get_errno(), "capset")
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)
    _prctl(_SET_DUMPABLE, 0)  # processes of the same user cannot attach to it


def end_with(parent: int) -> None:
    """This process is killed when `parent`, which forked it, ends."""
    if platform.system() == "Linux":
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def limit(*, memory: int, seconds: int, threads: int) -> None:
    """Bounds address space in bytes, processor time in seconds, and the threads of this user in all.

    No byte goes to a file, no core is dumped, no page is locked, and few descriptors stay open.
    """
    stack = 64 << 20
    limits = {
        "AS": memory,
        "CPU": seconds,
        "FSIZE": 0,
        "CORE": 0,
        "NOFILE": 64,
        "MEMLOCK": 0,
        "STACK": stack,
        "NPROC": threads,
    }
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError) if platform.system() != "Linux" else contextlib.nullcontext():
            resource.setrlimit(kind, (value, value))


def threads_of(user: int) -> int:
    """How many threads a user has now, which a limit on new ones must add to; 0 where that cannot be read."""
    count = 0
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                folder = f"/proc/{name}"
                count += len(os.listdir(f"{folder}/task")) if os.stat(folder).st_uid == user else 0
    return count
