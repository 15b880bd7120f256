"""A program to be killed: it boots, forks, freezes, thaws, copies and destroys VMs, and says what it was told.

    python crashing.py DATA SEED BOOT [STEP]    a line on standard output for each thing begun or done
    "ready" ──a line on standard input──► works until killed; with STEP it kills itself at that step of its next fork

BOOT is a BootImage and a MachineSpec as JSON, for the first thing it does; "-": nothing is booted.
"""

import asyncio
import os
import random
import signal
import sys

import msgspec

from vmm_core.engine import Engine
from vmm_core.errors import VmmError
from vmm_core.machine import BootImage, MachineSpec
from vmm_core.vm import RunningVm

WORKERS = 2
MOST_VMS = 4


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())


class Program:
    def __init__(self, engine: Engine, seed: int, boot: tuple[BootImage, MachineSpec] | None) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.boot = boot
        self.idle: list[RunningVm] = []
        self.frozen: list[str] = []

    async def work(self) -> None:
        while True:
            await self.step()

    async def step(self) -> None:
        """One thing, chosen at random; a VM at work is nobody else's meanwhile."""
        if self.boot is not None:
            (image, machine), self.boot = self.boot, None
            async with self.engine.boot(image, machine) as vm:
                say("booted", vm.id)
        elif self.frozen and self.random.random() < 0.6:
            await self.thaw(self.frozen.pop())
        elif not self.idle or (len(self.idle) < MOST_VMS and self.random.random() < 0.3):
            self.launched(await self.engine.launch("minimal", ttl=300))
        else:
            vm = self.idle.pop(self.random.randrange(len(self.idle)))
            act = self.random.choice([self.execute, self.copy, self.freeze, self.destroy])
            await act(vm)

    def launched(self, vm: RunningVm) -> None:
        say("launched", vm.id)
        self.idle.append(vm)

    async def execute(self, vm: RunningVm) -> None:
        said = (await vm.exec("hostname; echo $$ > /tmp/mark", timeout=30)).stdout.decode().strip()
        say("executed", vm.id, said)
        self.idle.append(vm)

    async def copy(self, vm: RunningVm) -> None:
        say("copying", vm.id)
        for child in await vm.fork_many(1, ttl=300):
            self.launched(child)
        self.idle.append(vm)

    async def freeze(self, vm: RunningVm) -> None:
        say("freezing", vm.id)
        await vm.freeze(ttl=300)
        say("frozen", vm.id)
        self.frozen.append(vm.id)

    async def thaw(self, vm_id: str) -> None:
        say("thawing", vm_id)
        vm = await self.engine.thaw(vm_id, ttl=300)
        say("thawed", vm_id)
        self.idle.append(vm)

    async def destroy(self, vm: RunningVm) -> None:
        say("destroying", vm.id)
        await vm.destroy()
        say("destroyed", vm.id)


async def main(data: str, seed: str, boot: str, step: str = "") -> None:
    what = None
    if boot != "-":
        what = msgspec.json.decode(
            boot, type=tuple[BootImage, MachineSpec], dec_hook=lambda kind, value: kind(value)
        )
    armed = False

    def on_step(name: str) -> None:
        if armed and name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    async with Engine.open(data, on_step=on_step) as engine:
        await engine.prewarm("minimal")
        program = Program(engine, int(seed), what)
        program.launched(await engine.launch("minimal", ttl=300))
        say("ready")
        await asyncio.to_thread(sys.stdin.readline)
        armed = True
        if step:
            await engine.launch("minimal", ttl=300)
        try:
            await asyncio.gather(*(program.work() for _ in range(WORKERS)))
        except VmmError as error:
            say("failed", type(error).__name__, str(error))
            raise


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
