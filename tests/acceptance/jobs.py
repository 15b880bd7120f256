"""The jobs the acceptance tests queue: workflows of the stage's repository, one job each."""

import textwrap


def _workflow(name: str, run: str, runs_on: str = "microvm") -> str:
    head = f"name: {name}\non: [push]\njobs:\n  {name}:\n    runs-on: {runs_on}\n    steps:\n      - run: |\n"
    return head + textwrap.indent(textwrap.dedent(run).strip(), " " * 10) + "\n"


LINES = 220
# What the job "lines" prints, to the byte.
PRINTED = "".join(f"line {n}\n" for n in range(1, LINES + 1)) + "line-end\n"
_STEPS = {
    # Prints a line at a time, slowly enough to be interrupted and fast enough to be waited for.
    "lines": f"for n in $(seq {LINES}); do echo line $n; sleep 0.02; done; echo line-end",
    "hold": "echo holding; sleep 600",
    "hello": "echo hello from $(hostname)",
    "identity": "echo id=$(cat /etc/machine-id)-$(cat /proc/sys/kernel/random/uuid)",
    "fails": "echo this fails; exit 3",
    "leaves": "echo what the job left > evidence; (echo in memory > /dev/shm/mark); exit 3",
    "panic": "echo before; sleep 1; echo c | sudo tee /proc/sysrq-trigger",
    "fill": """
        df -h .
        fallocate -l $(df --output=avail -B1 . | tail -1) fill || true
        dd if=/dev/zero of=more bs=1M
        """,
    "flood": "head -c 3000000 /dev/zero | tr '\\\\0' 'x' | fold -w 99; echo flood-end",
}
_LABELS = {
    "foreign": "ubuntu-latest",
    "nosuch": "microvm-nosuch",
    "unknown": "[microvm, gpu]",
    "companions": "[self-hosted, linux, x64, microvm]",
    "named": "microvm-github-runner",
}
JOBS = {
    **{f".github/workflows/{name}.yml": _workflow(name, run) for name, run in _STEPS.items()},
    **{f".github/workflows/{name}.yml": _workflow(name, "echo hello", on) for name, on in _LABELS.items()},
}
