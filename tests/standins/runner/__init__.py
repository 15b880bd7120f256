"""Makes a tarball of the stand-in runner with the layout of actions/runner; the same bytes every time."""

import gzip
import io
import tarfile
from pathlib import Path

FILES = Path(__file__).parent / "files"
VERSION = "2.329.0"
_EXECUTABLE = {"bin/Runner.Listener", "run.sh", "config.sh", "env.sh"}


def build_runner_tarball(dest: Path) -> Path:
    """Write ``dest`` (a ``.tar.gz``) and return it. Owner, times and order are fixed."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(FILES.rglob("*")):
            name = path.relative_to(FILES).as_posix()
            if "__pycache__" in name:
                continue
            entry = tarfile.TarInfo(f"./{name}")
            entry.mtime = 1_767_225_600
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
                continue
            data = path.read_bytes()
            entry.size, entry.mode = len(data), 0o755 if name in _EXECUTABLE else 0o644
            tar.addfile(entry, io.BytesIO(data))
    dest.write_bytes(gzip.compress(raw.getvalue(), mtime=0))
    return dest
