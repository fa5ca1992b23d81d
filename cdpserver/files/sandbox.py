"""A process that gives everything up but its memory and one connection.

What it reads is hostile. So, from `enter` on: another user where it was root, no new privileges, no files (none can be
opened), no children, a limit on memory; and a filter of system calls (seccomp, through libseccomp) that leaves only what
talking and computing need, or where there is none a user and network namespace. It dies with its parent.
"""

import ctypes
import os
import resource
import signal

MEMORY_BYTES = 1 << 30
"""Address space: Python with all parsers takes 150 MB, the rest is for metadata."""

CPU_SECONDS = 6 * 3600
"""A backstop only: the caller has deadlines of its own."""

NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_DUMPABLE = 4
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

_CALLS = (
    "read", "write", "recvfrom", "sendto", "recvmsg", "sendmsg", "close", "fstat", "lseek",
    "mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "futex", "getrandom",
    "rt_sigreturn", "rt_sigaction", "rt_sigprocmask", "sigaltstack", "restart_syscall",
    "clock_gettime", "clock_nanosleep", "gettimeofday", "sched_yield", "getpid", "gettid",
    "exit", "exit_group",
)  # fmt: skip


def enter(parent: int) -> str:
    """Give up everything; what else restrains the process: `seccomp`, `namespace` or `limits`."""
    libc = ctypes.CDLL(None, use_errno=True)
    restrained = "limits"
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be asked about
    rules = _filter()
    if rules is None and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        restrained = "namespace"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    if rules is not None:
        rules.load()
        restrained = "seccomp"
    return restrained


def _filter() -> "seccomp.SyscallFilter | None":
    if seccomp is None:
        return None
    rules = seccomp.SyscallFilter(seccomp.ERRNO(1))
    for name in _CALLS:
        rules.add_rule(seccomp.ALLOW, name)
    return rules


try:
    import pyseccomp as seccomp
except (ImportError, OSError, RuntimeError):  # without libseccomp
    seccomp = None
