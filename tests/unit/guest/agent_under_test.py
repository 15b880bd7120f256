"""The real agent with the calls that would change this host recorded instead of made.

``python -I -S agent_under_test.py AGENT RECORD [agent options]``: RECORD is a directory; the file ``calls``
in it gets one JSON line a call, and the identity files are written below it.
"""

import importlib.util
import json
import os
import sys
import time


def load(path):
    spec = importlib.util.spec_from_file_location("agent", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recording(agent, record):
    class Recording(agent.System):
        real = frozenset(os.environ.get("REAL", "").split())

        def __init__(self):
            super().__init__()
            if "files" not in self.real:
                self.root = record

        def note(self, *call):
            with open(f"{record}/calls", "a") as file:
                file.write(json.dumps(call) + "\n")

        def add_entropy(self, seed):
            self.note("add_entropy", len(seed))

        def set_clock(self, time_ns):
            self.note("set_clock", time_ns)
            return time_ns - time.time_ns()

        def set_kernel_hostname(self, name):
            self.note("hostname", name)
            if "hostname" in self.real:
                super().set_kernel_hostname(name)

        def call(self, name, *args):
            if name not in ("prctl", *self.real):
                self.note(name, *[a.decode() for a in args if isinstance(a, bytes)])
                return 0
            return super().call(name, *args)

        def sync(self):
            self.note("sync")

        def shield(self):
            pass

        def poweroff(self):
            self.note("poweroff")

    return Recording()


if __name__ == "__main__":
    agent_path, record, *options = sys.argv[1:]
    for directory in ("etc", "run"):
        os.makedirs(f"{record}/{directory}", exist_ok=True)
    module = load(agent_path)
    module.ZYGOTE_USER = os.environ.get("ZYGOTE_USER", module.ZYGOTE_USER)
    if "--as-is" in options:  # a socket cannot be opened by its path in /dev/fd
        module.open_port = lambda path: int(path.rpartition("/")[2])
    module.main(options, recording(module, record))
