"""Confine a process of Linux to what it needs: it reads some files, writes none, and opens no socket.

Files are closed by Landlock (Linux 5.13), which also keeps it from other processes' memory; sockets by a filter of
system calls (seccomp). Neither needs a privilege, both last until the process ends and hold for what it starts. There
is no well-kept library for either: `landlock` is a preview of 2025, `pyseccomp` of 2021 needs a library of the system.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Part = Literal["files", "network"]

# landlock(7): numbers of system calls, the same on every architecture; rights over files, by the version that has them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ASK_VERSION, RULE_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1 << 0, 1 << 1, 1 << 2, 1 << 3
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # then: move between folders, truncate, ioctl
TCP, TCP_FROM = 0b11, 4  # bind and connect
SCOPES, SCOPES_FROM = 0b11, 6  # abstract sockets, signals: none of processes outside

# seccomp(2) and bpf: the architecture as the kernel tells it, and the calls that make sockets.
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
ARCHITECTURES = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}  # socket, io_uring_setup
OTHER_NUMBERING = 0x40000000  # x86-64's calls with 32-bit pointers, which have numbers of their own from here on
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
NUMBER_AT, ARCHITECTURE_AT = 0, 4


def confine(reads: Iterable[Path]) -> list[Part]:
    """Confine this process, and return the parts that the system does not let it close: none on a current Linux.

    reads: files and folders that stay readable. Threads that are there already are not confined: call it first.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # on any system: no file grows
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    left: list[Part] = []
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0 or not _close_files(libc, reads):
        left.append("files")
    if not _close_network(libc):
        left.append("network")
    return left


def _close_files(libc: ctypes.CDLL, reads: Iterable[Path]) -> bool:
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ASK_VERSION)
    if version < 1:
        return False
    rights = sum(right for since, right in RIGHTS.items() if version >= since)
    handled = struct.pack("QQQ", rights, TCP * (version >= TCP_FROM), SCOPES * (version >= SCOPES_FROM))
    ruleset = libc.syscall(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        for path in reads:
            _allow(libc, ruleset, path, EXECUTE | READ_FILE | READ_DIRECTORY)
        _allow(libc, ruleset, Path(os.devnull), READ_FILE | WRITE_FILE)
        _allow(libc, ruleset, Path("/dev/urandom"), READ_FILE)
        return bool(libc.syscall(RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """Allow rights over a path and what is below it; a path that does not exist, or cannot be opened, stays closed."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        own = rights if path.is_dir() else rights & ~READ_DIRECTORY
        libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", own, opened), 0)
    finally:
        os.close(opened)


def _close_network(libc: ctypes.CDLL) -> bool:
    if platform.machine() not in ARCHITECTURES:
        return False
    code = ctypes.create_string_buffer(socket_filter(*ARCHITECTURES[platform.machine()]))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(code))  # struct sock_fprog
    return bool(libc.prctl(SET_SECCOMP, FILTER, program, 0, 0) == 0)


def socket_filter(architecture: int, refused: tuple[int, ...]) -> bytes:
    """Return the filter in the kernel's form: calls of another architecture or numbering are refused like `refused`."""
    checks = [(AT_LEAST, OTHER_NUMBERING), *((EQUAL, number) for number in refused)]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 0, len(checks) + 2, architecture),  # otherwise to the last line
        (LOAD, 0, 0, NUMBER_AT),
        *((kind, len(checks) - index, 0, number) for index, (kind, number) in enumerate(checks)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
