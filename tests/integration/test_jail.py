"""A VMM that its guest has taken over finds nothing in its cell: every attempt works outside and fails inside.

``taken_over.c`` is the VMM: it runs once in a plain process with the rights of root, which shows that the attempt
would work, and once in a cell of the real jailer.
"""

import asyncio
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from vmm_core.cgroup import Cgroups, Limits
from vmm_core.errors import BadRequest, HostUnfit, VmmMissing
from vmm_core.jail import CellSpec, Jailer
from vmm_core.process import VmmProcess, start_ticks

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="jailing needs root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the attacker is compiled here (gcc)"),
]

# Far above every slot: these tests share the host with real VMs.
FIRST = 900_000
SMALL = Limits(vcpus=1, memory_mib=32, vmm_mib=32, disk_mib=64)
WORKED, REFUSED, FATAL = 0, 10, -signal.SIGSYS
NEW_USER, NEW_MOUNTS = "10000000", "20000"


class Ended(NamedTuple):
    status: int | None
    said: str


class Neighbour(NamedTuple):
    """Another VM: its process, where its secret lies in its memory, its disk."""

    pid: str
    address: str
    disk: Path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("program") / "taken_over"
    source = Path(__file__).with_name("taken_over.c")
    subprocess.run(["gcc", "-static", "-O1", "-pthread", "-o", target, source], check=True)
    return target


@pytest.fixture(scope="module")
async def jailer(program: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Jailer]:
    opened = await Jailer.open(tmp_path_factory.mktemp("data"), program)
    assert opened.jailed, opened.why
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def plain() -> AsyncIterator[Jailer]:
    """Cells without a jail, as on a host that has not the rights for one."""
    opened = Jailer(None, Cgroups(()))
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def neighbour(
    jailer: Jailer, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Neighbour]:
    disk = tmp_path_factory.mktemp("neighbour") / "disk.img"
    disk.write_bytes(b"secret")
    process = await start(jailer, FIRST + 1, program, "wait")
    while not process.log_text():
        await asyncio.sleep(0.01)
    yield Neighbour(str(process.pid), process.log_text().strip(), disk)
    await process.end()
    process.close()
    await jailer.cgroups.remove(FIRST + 1)


def spec(number: int, limits: Limits = SMALL) -> CellSpec:
    return CellSpec(number=number, uid=2_000_000 + number, limits=limits)


async def start(
    jailer: Jailer,
    number: int,
    program: Path,
    *words: str,
    fds: Sequence[int] = (),
    limits: Limits = SMALL,
    seconds: float = 60,
) -> VmmProcess:
    cell = await jailer.prepare(spec(number, limits))
    return await cell.run([str(program), *words], fds=fds, deadline=time.time() + seconds)


async def attempt(
    jailer: Jailer, program: Path, *words: str, fds: Sequence[int] = (), limits: Limits = SMALL
) -> Ended:
    process = await start(jailer, FIRST, program, *words, fds=fds, limits=limits)
    try:
        return Ended(await asyncio.wait_for(process.wait(), 20), process.log_text())
    finally:
        await process.end()
        process.close()
        await jailer.cgroups.remove(FIRST)


# ── what a taken-over VMM tries ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "inside"),
    [
        (["read", "{disk}"], REFUSED),
        (["write", "{disk}"], REFUSED),
        (["read", "/etc/passwd"], REFUSED),
        (["read", "/proc/kallsyms"], REFUSED),
        (["read", "/proc/sys/kernel/osrelease"], REFUSED),
        (["read", "/proc/{pid}/status"], REFUSED),
        (["create", "{directory}/new"], REFUSED),
        (["create", "/new"], REFUSED),
        (["create", "/dev/new"], REFUSED),
        (["create", "/tmp/{pid}-new"], REFUSED),
        (["chmod", "{program}"], REFUSED),
        (["processes"], REFUSED),
        (["mem", "{pid}", "{address}"], REFUSED),
        (["vm_readv", "{pid}", "{address}"], FATAL),
        (["ptrace", "{pid}"], FATAL),
        (["getfd", "{pid}"], FATAL),
        (["kill", "{pid}"], REFUSED),
        (["kill_all"], REFUSED),
        (["exec", "{program}"], FATAL),
        (["execveat", "{program}"], FATAL),
        (["fork"], REFUSED),
        (["clone", "0"], REFUSED),
        (["clone", NEW_USER], REFUSED),
        (["unshare", NEW_USER], FATAL),
        (["unshare", NEW_MOUNTS], FATAL),
        (["setns"], FATAL),
        (["mount", "{directory}"], FATAL),
        (["mknod", "{directory}/memory"], FATAL),
        (["root"], FATAL),
        (["chroot"], FATAL),
        (["prctl"], REFUSED),
        (["i386"], FATAL),
        (["threads", "300"], REFUSED),
        (["descriptors", "1000"], REFUSED),
        (["memory", "200"], -signal.SIGKILL),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_what_works_with_the_rights_of_root_fails_in_a_cell(
    jailer: Jailer, plain: Jailer, program: Path, neighbour: Neighbour, words: list[str], inside: int
) -> None:
    facts = {
        "disk": neighbour.disk,
        "directory": neighbour.disk.parent,
        "pid": neighbour.pid,
        "address": neighbour.address,
        "program": program,
    }
    filled = [word.format(**facts) for word in words]
    outside = await attempt(plain, program, *filled)
    assert outside.status == WORKED, f"the attempt finds nothing to begin with: {outside}"
    ended = await attempt(jailer, program, *filled)
    assert ended.status == inside, ended


@pytest.mark.parametrize(
    "family_and_kind",
    [(1, 1), (1, 5), (2, 1), (2, 2), (2, 3), (10, 1), (10, 2), (16, 3), (17, 3), (38, 5), (40, 1)],
    ids=str,
)
async def test_no_socket_can_be_opened(
    jailer: Jailer, plain: Jailer, program: Path, family_and_kind: tuple[int, int]
) -> None:
    words = ["socket", *map(str, family_and_kind)]
    outside = await attempt(plain, program, *words)
    if "not supported" in outside.said:
        pytest.skip("this kernel has no such sockets")
    assert outside.status == (REFUSED if family_and_kind == (2, 3) else WORKED), outside
    inside = await attempt(jailer, program, *words)
    assert (inside.status, inside.said) == (REFUSED, "socket: Permission denied\n")


@pytest.mark.parametrize(
    ("number", "inside"),
    [
        (57, FATAL),  # fork, as no libc makes it any more
        (321, FATAL),  # bpf
        (250, FATAL),  # keyctl
        (298, FATAL),  # perf_event_open
        (175, FATAL),  # init_module
        (430, FATAL),  # fsopen
        (428, FATAL),  # open_tree
        (304, FATAL),  # open_by_handle_at
        (103, FATAL),  # syslog
        (0x40000000 + 39, FATAL),  # getpid of the x32 calls
        (425, REFUSED),  # io_uring_setup
        (323, REFUSED),  # userfaultfd
        (434, REFUSED),  # pidfd_open
        (62, REFUSED),  # kill
        (435, REFUSED),  # clone3
        (112, REFUSED),  # setsid
    ],
)
async def test_system_calls_no_vmm_needs_are_fatal_or_unknown(
    jailer: Jailer, plain: Jailer, program: Path, number: int, inside: int
) -> None:
    outside = await attempt(plain, program, "call", str(number))
    assert outside.status in (WORKED, REFUSED), outside
    ended = await attempt(jailer, program, "call", str(number))
    assert ended.status == inside, ended
    if inside == REFUSED:
        assert "Function not implemented" in ended.said


@pytest.mark.parametrize("how", ["pwrite", "mmap", "mprotect", "ftruncate", "punch", "reopen"])
async def test_the_memory_of_the_parent_cannot_be_written(
    jailer: Jailer, plain: Jailer, program: Path, how: str
) -> None:
    unsealed, sealed = parent_memory(seal=False), parent_memory(seal=True)
    try:
        assert (await attempt(plain, program, how, "3", fds=[unsealed])).status == WORKED
        assert (await attempt(jailer, program, how, "3", fds=[sealed])).status == REFUSED
        assert os.fstat(sealed).st_size == 1 << 16
        assert os.pread(sealed, 1 << 16, 0) == b"parent".ljust(1 << 16, b"\0")
    finally:
        os.close(unsealed)
        os.close(sealed)


async def test_the_mode_of_the_parent_cannot_be_changed(jailer: Jailer, plain: Jailer, program: Path) -> None:
    memory = parent_memory(seal=True)
    try:
        assert (await attempt(jailer, program, "fchmod", "3", fds=[memory])).status == REFUSED
        assert os.fstat(memory).st_mode & 0o777 == 0o777
        assert (await attempt(plain, program, "fchmod", "3", fds=[memory])).status == WORKED
    finally:
        os.close(memory)


async def test_a_file_given_to_read_cannot_be_opened_to_write(
    jailer: Jailer, plain: Jailer, program: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.bin"
    state.write_bytes(b"state")
    with state.open("rb") as file:
        assert (await attempt(jailer, program, "reopen", "3", fds=[file.fileno()])).status == REFUSED
        assert state.read_bytes() == b"state"
        assert (await attempt(plain, program, "reopen", "3", fds=[file.fileno()])).status == WORKED


async def test_a_file_cannot_grow_beyond_the_size_of_the_disk(
    jailer: Jailer, plain: Jailer, program: Path, tmp_path: Path
) -> None:
    with (tmp_path / "disk.img").open("w+b") as disk:
        inside = await attempt(jailer, program, "beyond", "3", fds=[disk.fileno()])
        assert (inside.status, inside.said) == (REFUSED, "pwrite: File too large\n")
        assert (await attempt(plain, program, "beyond", "3", fds=[disk.fileno()])).status == WORKED


def parent_memory(*, seal: bool) -> int:
    fd = os.memfd_create("parent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"parent")
    os.ftruncate(fd, 1 << 16)
    if seal:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# ── what the kernel says of a cell ───────────────────────────────────────────────────────────────


async def test_a_cell_has_no_rights_and_namespaces_of_its_own(
    jailer: Jailer, program: Path, neighbour: Neighbour
) -> None:
    process = await start(jailer, FIRST, program, "wait")
    try:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        )
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert status["Uid"] == status["Gid"] == "\t".join([str(2_000_000 + FIRST)] * 4)
        assert status["Groups"].strip() == ""
        assert (status["NoNewPrivs"], status["Seccomp"], status["Umask"]) == ("1", "2", "0077")
        assert status["NSpid"].split() == [str(process.pid), "1"]
        for name in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
            own = os.readlink(f"/proc/{process.pid}/ns/{name}")
            assert own != os.readlink(f"/proc/self/ns/{name}"), name
            assert own != os.readlink(f"/proc/{neighbour.pid}/ns/{name}") or name == "cgroup", name
        mounts = [line.split() for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()]
        assert {mount[4]: set(mount[5].split(",")) - {"relatime"} for mount in mounts} == {
            "/": {"ro", "nosuid", "nodev"},
            "/dev": {"ro", "nosuid", "noexec"},
            "/proc": {"rw", "nosuid", "nodev", "noexec"},
        }
        root = Path(f"/proc/{process.pid}/root")
        assert {path.name for path in (root / "dev").iterdir()} == {"null", "urandom"}
        assert {path.name for path in root.iterdir()} == {"dev", "proc", program.parts[1]}
        assert set(os.listdir(f"/proc/{process.pid}/fd")) == {"0", "1", "2"}
        assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        assert {pair.partition(b"=")[0] for pair in environment if pair} == {b"PATH", b"LC_ALL"}
        assert os.getsid(process.pid) == process.pid
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert limits.count("Max core file size        0                    0") == 1
    finally:
        await process.end()
        process.close()
        await jailer.cgroups.remove(FIRST)


async def test_the_service_still_reads_the_memory_of_a_jailed_vmm(jailer: Jailer, program: Path) -> None:
    process = await start(jailer, FIRST, program, "wait")
    try:
        while not process.log_text():
            await asyncio.sleep(0.01)
        with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(int(process.log_text(), 16))
            assert memory.read(25) == b"the memory of a neighbour"
        with Path(f"/proc/{process.pid}/pagemap").open("rb") as pages:
            assert len(pages.read(8)) == 8
        assert "Private_Dirty" in Path(f"/proc/{process.pid}/smaps").read_text()
        assert os.readlink(f"/proc/{process.pid}/fd/2").startswith("/memfd:microvm-vmm-log")
    finally:
        await process.end()
        process.close()
        await jailer.cgroups.remove(FIRST)


async def test_a_vmm_killed_for_its_memory_is_counted(jailer: Jailer, program: Path) -> None:
    if "memory" not in jailer.cgroups.controllers:
        pytest.skip("this host limits no memory")
    process = await start(jailer, FIRST, program, "memory", "200")
    try:
        assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
        assert jailer.cgroups.oom_kills(FIRST) == 1
        assert FIRST in jailer.cgroups.numbers()
    finally:
        process.close()
        await jailer.cgroups.remove(FIRST)
    assert FIRST not in jailer.cgroups.numbers()


async def test_the_cpu_quota_holds(jailer: Jailer, plain: Jailer, program: Path) -> None:
    if "cpu" not in jailer.cgroups.controllers:
        pytest.skip("this host limits no CPU")
    limits = Limits(vcpus=1, memory_mib=32, vmm_mib=32, cpu_percent=20)

    async def share(owner: Jailer) -> float:
        process = await start(owner, FIRST, program, "burn", "20000", limits=limits)
        try:
            await asyncio.sleep(1.5)
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") / 1.5
        finally:
            await process.end()
            process.close()
            await owner.cgroups.remove(FIRST)

    limited = await share(jailer)
    assert limited < 0.3, limited
    assert await share(plain) > limited * 1.3


# ── the life of cells ────────────────────────────────────────────────────────────────────────────


async def test_descriptors_become_3_and_up_in_order_and_all_others_close(
    jailer: Jailer, plain: Jailer, program: Path, tmp_path: Path
) -> None:
    files = [(tmp_path / str(number)).open("w+b") for number in range(40)]
    for owner in (jailer, plain):
        process = await start(owner, FIRST, program, "wait", fds=[file.fileno() for file in reversed(files)])
        try:
            found = {
                int(fd): os.readlink(f"/proc/{process.pid}/fd/{fd}")
                for fd in os.listdir(f"/proc/{process.pid}/fd")
            }
            assert [found.pop(3 + index) for index in range(40)] == [file.name for file in reversed(files)]
            assert set(found) == {0, 1, 2}
        finally:
            await process.end()
            process.close()
            await owner.cgroups.remove(FIRST)
    for file in files:
        file.close()


async def test_a_program_that_is_not_there_is_told_by_name(jailer: Jailer, plain: Jailer) -> None:
    for owner in (jailer, plain):
        cell = await owner.prepare(spec(FIRST))
        with pytest.raises(VmmMissing, match=r"/no/such/vmm.*No such file"):
            await cell.run(["/no/such/vmm"], deadline=time.time() + 10)
        assert not cell.waiting
        await owner.cgroups.remove(FIRST)


async def test_what_cannot_be_is_refused_before_anything_starts(jailer: Jailer, program: Path) -> None:
    with pytest.raises(BadRequest, match="uid 0"):
        await jailer.prepare(CellSpec(number=FIRST, uid=0, limits=SMALL))
    with pytest.raises(HostUnfit, match="mv-nowhere"):
        await jailer.prepare(CellSpec(number=FIRST, uid=2_000_000, limits=SMALL, netns="mv-nowhere"))
    cell = await jailer.prepare(spec(FIRST))
    with pytest.raises(BadRequest, match=r"300\d+ bytes"):
        await cell.run([str(program), "x" * 300_000], deadline=time.time() + 10)
    assert start_ticks(cell.pid) is None
    await jailer.cgroups.remove(FIRST)


async def test_a_discarded_cell_leaves_nothing(jailer: Jailer) -> None:
    before = set(os.listdir("/proc/self/fd"))
    cells = await asyncio.gather(*(jailer.prepare(spec(FIRST + 10 + index)) for index in range(8)))
    assert all(cell.waiting for cell in cells)
    assert len({cell.pid for cell in cells}) == 8
    for index, cell in enumerate(cells):
        await cell.discard()
        await jailer.cgroups.remove(FIRST + 10 + index)
    assert all(start_ticks(cell.pid) is None for cell in cells)
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_cancelled_preparation_leaves_nothing(jailer: Jailer) -> None:
    before = (set(os.listdir("/proc/self/fd")), children())
    cancelled = 0
    for pause in (0, 0.0005, 0.001, 0.002, 0.004):
        task = asyncio.create_task(jailer.prepare(spec(FIRST)))
        await asyncio.sleep(pause)
        task.cancel()
        try:
            await (await task).discard()  # it was quicker
        except asyncio.CancelledError:
            cancelled += 1
    assert cancelled > 0
    assert (set(os.listdir("/proc/self/fd")), children()) == before
    await jailer.cgroups.remove(FIRST)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_a_cell_that_waits_can_be_given_other_limits(jailer: Jailer, program: Path) -> None:
    cell = await jailer.prepare(spec(FIRST))
    cell.fit(Limits(vcpus=1, memory_mib=480, vmm_mib=32, disk_mib=128))
    process = await cell.run([str(program), "memory", "200"], deadline=time.time() + 20)
    assert await asyncio.wait_for(process.wait(), 20) == WORKED, "more than it was prepared with"
    process.close()
    limited = await jailer.prepare(spec(FIRST, Limits(vcpus=1, memory_mib=480, vmm_mib=32, disk_mib=128)))
    limited.fit(SMALL)
    process = await limited.run([str(program), "memory", "200"], deadline=time.time() + 20)
    limits = Path(f"/proc/{process.pid}/limits").read_text() if process.running else ""
    assert "Max file size             67108864             67108864" in limits or not limits
    assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
    process.close()
    await jailer.cgroups.remove(FIRST)


async def test_a_service_without_descriptors_left_gets_an_error_and_leaves_nothing(jailer: Jailer) -> None:
    await (await jailer.prepare(spec(FIRST))).discard()
    before = (set(os.listdir("/proc/self/fd")), children())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    try:
        for room in range(24):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_free(room), hard))
            try:
                cell = await jailer.prepare(spec(FIRST))
            except HostUnfit:
                refused += 1
            else:
                await cell.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 0 < refused < 24
    await asyncio.sleep(0.2)
    await (await jailer.prepare(spec(FIRST))).discard()
    assert (set(os.listdir("/proc/self/fd")), children()) == before
    await jailer.cgroups.remove(FIRST)


def limit_with_free(count: int) -> int:
    """A limit below which ``count`` numbers of descriptors are free."""
    number, free = 0, 0
    while True:
        if not Path(f"/proc/self/fd/{number}").is_symlink():
            if free == count:
                return number
            free += 1
        number += 1
