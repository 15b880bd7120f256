"""Small file work without ``os``: paths are str, missing parents are made."""

import posix


def read(path, limit=16 << 20):
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        parts, size = [], 0
        while size <= limit:
            part = posix.read(fd, 65536)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
        raise OSError(path + " is too large")
    finally:
        posix.close(fd)


def write(path, data, mode=0o644):
    fd = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, mode)
    try:
        write_all(fd, data)
    finally:
        posix.close(fd)


def append_to(path):
    """A file descriptor that appends."""
    return posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC, 0o644)


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[posix.write(fd, view) :]


def exists(path):
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def make(path):
    """The directory and its parents."""
    try:
        posix.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        make(path.rpartition("/")[0])
        make(path)
