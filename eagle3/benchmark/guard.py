"""The program in which `scoring` runs code that a model wrote: `guard.py [FOLDER] < FILE`.

FILE is a marker and, below it, the code. The marker goes to stdout when the code has run to its
end. With FOLDER this process has namespaces of its own, where it may mount.
"""

import ctypes
import os
import resource
import sys

SECONDS, MEMORY = 10, 1 << 30
LIMITS = {"CPU": SECONDS, "AS": MEMORY, "FSIZE": 1 << 20, "NOFILE": 32, "NPROC": 0, "CORE": 0}
NOBODY = 65534
# Of sys/mount.h, linux/mount.h, fcntl.h, sys/prctl.h and linux/capability.h.
MS_BIND_REC, MS_NOSUID_NODEV, MOUNT_SETATTR = 0x1000 | 0x4000, 2 | 4, 442
MOUNT_ATTR_RDONLY, AT_FDCWD, AT_RECURSIVE = 1, -100, 0x8000
PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 38, 0x20080522


def call(name: str, *arguments) -> None:
    """A function of the C library. Raises OSError where it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def enter_root(folder: str) -> None:
    """Go to a root that has the programs of this machine, read-only, and an empty /tmp.

    No files of the user, no sockets and no devices are there.
    """
    call("mount", b"root", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, b"mode=755")
    for place in ("/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix):
        if os.path.isdir(place) and not os.path.exists(folder + place):
            os.makedirs(folder + place)
            call("mount", place.encode(), (folder + place).encode(), None, MS_BIND_REC, None)
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    size = ctypes.sizeof(attributes)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, size)
    limits = b"mode=1777,size=16m"
    call("mount", b"tmp", f"{folder}/tmp".encode(), b"tmpfs", MS_NOSUID_NODEV, limits)
    os.chroot(folder)
    os.chdir("/tmp")


def drop_rights(is_root: bool) -> None:
    """No user's rights, and no way to new ones."""
    if is_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)())


def main() -> None:
    marker, _, code = sys.stdin.buffer.read().partition(b"\n")
    told = os.dup(1)
    for stream in (0, 1):
        os.dup2(2, stream)
    if sys.argv[1:]:
        with open("/proc/self/uid_map") as file:  # a user's namespace maps that user alone
            is_root = int(file.read().split()[2]) > 1
        enter_root(sys.argv[1])
        drop_rights(is_root)
    for name, most in LIMITS.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    exec(compile(code, "answer.py", "exec"), {"__name__": "__main__"})
    os.write(told, marker)
    os._exit(0)


if __name__ == "__main__":
    main()
