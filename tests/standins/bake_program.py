"""A program that keeps to the contract of ``microvm bake --repo``: see ``repositories``. Standard library only.

``bake.json`` holds a list of orders; each start takes the first one, the last one stays. An order is
``{"seconds", "exit", "answer", "spawn", "ignore_term", "key"}``.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    directory = Path(sys.argv[1])
    options = dict(zip(sys.argv[2::1], sys.argv[3::1], strict=False))
    credential = sys.stdin.buffer.read()
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orders = json.loads(file.read_text()) if (file := directory / "bake.json").exists() else [{}]
        if len(orders) > 1:
            file.write_text(json.dumps(orders[1:]))
        with (directory / "started").open("a") as started:
            line = {"argv": sys.argv, "stdin": credential.decode(), "pid": os.getpid(), "nice": os.nice(0)}
            line["environ"] = sorted(os.environ)
            started.write(json.dumps(line) + "\n")
    order = orders[0]
    if order.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if order.get("spawn"):
        child = subprocess.Popen(["sleep", "60"])
        (directory / "child").write_text(str(child.pid))
    print("fetch: the repository", file=sys.stderr, flush=True)
    print("install: npm ci", file=sys.stderr, flush=True)
    time.sleep(order.get("seconds", 0))
    if "answer" in order:
        print(order["answer"] if isinstance(order["answer"], str) else json.dumps(order["answer"]))
        return order.get("exit", 1)
    name = f"{options['--name'].lower()}@{options['--branch']}"
    commit = options["--ref"]
    key = order.get("key") or json.loads((directory / "keys.json").read_text())[commit]
    digest = f"{abs(hash((name, key, time.time()))):064x}"[-64:]
    made = {"name": name, "digest": digest, "key": key, "commit": commit}
    base = (directory / "base").read_text()
    (directory / "baked").mkdir(exist_ok=True)
    draft = directory / f".{os.getpid()}"
    draft.write_text(json.dumps({**made, "base": base}))
    draft.replace(directory / "baked" / f"{time.time_ns()}.json")
    steps = [{"step": "fetch", "seconds": 0.1}, {"step": "install", "seconds": 0.2}]
    print(
        json.dumps(
            {**made, "cache_hit": False, "incremental": True, "seconds": 0.3, "steps": steps}, indent=2
        )
    )
    return order.get("exit", 0)


def runs(pid: int) -> bool:
    """Whether the process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
