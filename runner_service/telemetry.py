"""Logs (structlog) and metrics (Prometheus): names, codes and times, never a secret, a body or a job's output."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runner_service.domain import TimelineRow
from runner_service.phases import Watch
from vmm_core.machine import VmExit, VmUsage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 21600)


def configure_logging(format_: Literal["auto", "json", "console"], level: str) -> None:
    """Log events as one JSON object a line, or coloured text; ``auto`` means text on a terminal."""
    console = format_ == "console" or (format_ == "auto" and sys.stderr.isatty())
    render = (
        # Plain: the richer formats print local variables, and those may hold a secret.
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        # Not cached: a reload may change the level.
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module: warnings only, and nothing that could print a request.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    for noisy in ("httpx", "httpcore", "aiosqlite", "sqlalchemy.engine"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


# Lines of a job's story that are steps of it, besides the states of its runner, which are counted as they are entered.
_STEPS = {
    "placed": "placed", "forked": "forked", "registered": "registered", "started": "started",
    "in progress": "picked_up", "completed": "completed",
}  # fmt: skip

LABELS_KEPT = 200
OTHER = "other"


class Names:
    """Values of one label, kept few: the first 200 that come up since the start; all later ones are ``other``.

    A forge can have any number of repositories, and each label value is a time series for ever.
    """

    def __init__(self, most: int = LABELS_KEPT) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, name: str | None) -> str:
        if name is None:
            return OTHER
        if name not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(name)
        return name


class Metrics:
    """The service's own metrics, in a registry of their own (tests make several)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.deliveries = Counter(
            "microvm_deliveries", "Webhook deliveries by event and result.", ["event", "result"],
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "microvm_access_refused", "Requests to the API that were refused, by why.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.events = Counter(
            "microvm_events",
            "Job events worked into the books, by what they changed.",
            ["outcome"],
            registry=self.registry,
        )
        self.jobs = Counter(
            "microvm_jobs", "Jobs by the state they entered.", ["state"], registry=self.registry
        )
        self.reasons = Counter(
            "microvm_reasons", "Why runners retired, jobs waited or steps failed, by code.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.steps = Histogram(
            "microvm_step_seconds", "From the event that asked for the job to the step.", ["step"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.state_seconds = Histogram(
            "microvm_state_seconds", "How long runners stay in a state.", ["state"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.phases = Histogram(
            "microvm_phase_seconds", "How long jobs were in each phase of their life.", ["phase"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.waits = Histogram(
            "microvm_wait_seconds", "How long jobs were held back, by what for.", ["reason"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.queue = Gauge(
            "microvm_queued_jobs", "Jobs that are queued at the forge.", registry=self.registry
        )
        self.oldest = Gauge(
            "microvm_oldest_queued_seconds", "For how long the oldest of them waits.", registry=self.registry
        )
        self._watch = Watch()
        self._reasons = Names()
        self.passes = Histogram(
            "microvm_pass_seconds", "One pass of the scheduler.", buckets=_SECONDS, registry=self.registry
        )
        self.forge_held = Gauge(
            "microvm_forge_held", "Accounts, or the whole forge, to which no call is made for now, by why.",
            ["code"], registry=self.registry,
        )  # fmt: skip
        self.runners = Gauge("microvm_runners", "Runners by state.", ["state"], registry=self.registry)
        self.vms = Gauge("microvm_vms", "VMs of this host.", registry=self.registry)
        self.room = Gauge("microvm_room_vms", "VMs this host could still take.", registry=self.registry)
        self.rss = Gauge("microvm_service_rss_bytes", "Memory of the service itself.", registry=self.registry)
        self.parents = Counter(
            "microvm_parents", "Parents chosen for jobs, by why it was that one; gone: it could not be forked.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self.infra_failures = Counter(
            "microvm_infra_failures", "Jobs whose infrastructure failed under them, by code.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.reruns = Counter(
            "microvm_reruns", "Re-runs after failures of infrastructure, by what came of them.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.frozen = Counter(
            "microvm_frozen", "VMs of failed jobs: frozen, failed to be, removed.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.bakes = Counter(
            "microvm_bakes",
            "Bakes of repositories' parents, by outcome; hit: there was one already, again: tried once more.",
            ["outcome"],
            registry=self.registry,
        )
        self.bake_seconds = Histogram(
            "microvm_bake_seconds",
            "Bakes of repositories' parents.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.bakes_under_way = Gauge(
            "microvm_bakes_under_way", "Bakes by state.", ["state"], registry=self.registry
        )
        self.polls = Counter(
            "microvm_polls",
            "Looks at repositories for jobs without events and questions about single jobs, by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        self.found = Counter(
            "microvm_jobs_found", "New jobs, by how they were learned of: a delivery, a poll, or asking.", ["via"],
            registry=self.registry,
        )  # fmt: skip
        self.redeliveries = Counter(
            "microvm_redeliveries", "Lost deliveries, by what came of asking for them again.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.owners = Names()
        self.poll_interval = self._gauge(
            "microvm_poll_interval_seconds", "Every how long repositories in use are looked at.", ["owner"]
        )
        self.rate_limit = self._gauge(
            "microvm_rate_limit_remaining", "Calls the forge still takes within the hour.", ["owner"]
        )
        self._repositories = Names()
        self._templates = Names()
        live, ended = ["template"], ["repository"]
        self.vms_live = self._gauge("microvm_vms_live", "VMs of this service that run.", live)
        self.vm_memory = self._gauge(
            "microvm_vm_memory_bytes",
            "Memory of the running VMs: the guests' own pages (private), those they share with their parents "
            "(shared), their share of all (pss), and the VMMs' own (vmm).",
            [*live, "kind"],
        )
        self.vm_disk = self._gauge("microvm_vm_disk_bytes", "Disk blocks only the running VMs hold.", live)
        self.need = self._gauge(
            "microvm_template_need_bytes", "Memory that one more fork is expected to need, as learned.", live
        )
        self.ends = Counter("microvm_vm_ends", "VMs that ended, by cause.", ["cause"], registry=self.registry)
        self.cpu = self._counter("microvm_repository_cpu_seconds", "CPU time of ended VMs.", ended)
        self.vm_seconds = self._counter("microvm_repository_vm_seconds", "Life time of ended VMs.", ended)
        self.memory_seconds = self._counter(
            "microvm_repository_memory_mib_seconds",
            "Life time of ended VMs × their peak of own memory.",
            ended,
        )
        self.disk = self._counter(
            "microvm_repository_disk_bytes", "Storage I/O of ended VMs.", [*ended, "direction"]
        )
        self.network = self._counter(
            "microvm_repository_network_bytes", "Network traffic of ended VMs.", [*ended, "direction"]
        )

    def hold_back(self, codes: Iterable[str]) -> None:
        """How many are held back now, by code."""
        self.forge_held.clear()
        for code in codes:
            self.forge_held.labels(code).inc()

    def _gauge(self, name: str, what: str, labels: list[str]) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, labels: list[str]) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def live(self, readings: Iterable[tuple[str | None, VmUsage | None]], needs: Mapping[str, int]) -> None:
        """Show the running VMs, each as its template and its last reading, and the bytes each template needs."""
        for gauge in (self.vms_live, self.vm_memory, self.vm_disk, self.need):
            gauge.clear()
        for name, usage in readings:
            template = self._templates.of(name)
            self.vms_live.labels(template).inc()
            if usage is not None:
                for kind, count in (
                    ("private", usage.private_dirty_bytes), ("shared", usage.shared_bytes),
                    ("pss", usage.pss_bytes), ("vmm", usage.vmm_private_bytes),
                ):  # fmt: skip
                    self.vm_memory.labels(template, kind).inc(count)
                self.vm_disk.labels(template).inc(usage.disk_private_bytes)
        for name, need in needs.items():
            self.need.labels(self._templates.of(name)).set(need)

    def told(self, rows: Sequence[TimelineRow]) -> None:
        """Measure what these lines of jobs' stories, just written, bring to an end."""
        for row in rows:
            if row.step in _STEPS and row.ms is not None:
                self.steps.labels(_STEPS[row.step]).observe(max(0.0, row.ms / 1000))
        for ended in self._watch.told(rows):
            self.phases.labels(ended.phase).observe(ended.seconds)
            if ended.phase == "waiting":
                self.waits.labels(self._reasons.of(ended.reason)).observe(ended.seconds)

    def spent(
        self, repository: str | None, ending: VmExit | None, *, since: float | None, now: float
    ) -> None:
        """Put what an ended VM cost on the account of ``repository``."""
        if ending is None:
            return
        self.ends.labels(ending.cause).inc()
        name, usage = self._repositories.of(repository), ending.usage
        seconds = max(0.0, now - since) if since is not None else 0.0
        self.vm_seconds.labels(name).inc(seconds)
        if usage is not None:
            self.cpu.labels(name).inc(usage.cpu_seconds)
            self.memory_seconds.labels(name).inc(seconds * usage.peak_bytes / (1 << 20))
            self.disk.labels(name, "read").inc(usage.disk_read_bytes)
            self.disk.labels(name, "written").inc(usage.disk_write_bytes)
            self.network.labels(name, "sent").inc(usage.net_sent_bytes)
            self.network.labels(name, "received").inc(usage.net_received_bytes)


class DeliveryCounters:
    """What the receiver counts, as metrics; all words come from small fixed sets."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def refused(self, code: str) -> None:
        self._metrics.deliveries.labels("", code).inc()

    def accepted(self, event: str, outcome: str) -> None:
        self._metrics.deliveries.labels(event, outcome).inc()
