"""Finds VMs of ours that nobody owns any more, and destroys those seen on two passes.

Adopting takes every VM whose program died. Those that ``microvm serve``, ``run`` or ``bake`` made are destroyed;
those that another program made through the library are kept until their own time limit.
"""

from collections.abc import Mapping

import structlog

from runner_service.ports import Hypervisor
from vmm_core.errors import UnknownVm, VmmError

log = structlog.get_logger("reaper")


class Reaper:
    """Looks at the VMs that this service made, and at orphans that a command of ours made; at no others."""

    def __init__(self, hypervisor: Hypervisor, *, service: str) -> None:
        self._hypervisor = hypervisor
        self._service = service
        self._suspects: set[str] = set()
        self.last_pass = 0.0

    async def sweep(self, owned: set[str], orphans: set[str], now: float) -> list[str]:
        """Destroy what was unowned on the last pass and still is.

        ``owned`` are ids of runners that are not gone; ``orphans`` ids of VMs whose program died.
        """
        self.last_pass = now
        unowned: set[str] = set()
        for record in self._hypervisor.records():
            runner_id = record.metadata.get("runner_id")
            made_here = record.metadata.get("service") == self._service
            orphan = record.id in orphans and _ours(record.metadata)
            if (made_here or orphan) and runner_id not in owned:
                unowned.add(record.id)
        destroyed: list[str] = []
        for vm_id in sorted(unowned & self._suspects):
            try:
                await self._hypervisor.destroy(vm_id)
            except UnknownVm:
                continue
            except VmmError as error:
                log.warning("reap_failed", vm=vm_id, error=str(error))
                continue
            destroyed.append(vm_id)
            log.warning("reaped", vm=vm_id, why="no runner owned it on two passes")
        self._suspects = unowned - set(destroyed)
        return destroyed


def _ours(metadata: Mapping[str, str]) -> bool:
    """Whether ``microvm serve``, ``run`` or ``bake`` made a VM of this metadata."""
    return "runner_id" in metadata or metadata.get("purpose") == "run" or "bake" in metadata
