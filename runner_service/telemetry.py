"""Logs (structlog) and metrics (Prometheus): names, codes and times, never a secret, a body or a job's output."""

import logging
import sys
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard module: warnings only, and nothing that could print a request.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    for noisy in ("httpx", "httpcore", "aiosqlite", "sqlalchemy.engine"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Metrics:
    """The service's own metrics, in a registry of their own (tests make several)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.deliveries = Counter(
            "microvm_deliveries", "Webhook deliveries by event and result.", ["event", "result"],
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
        self.passes = Histogram(
            "microvm_pass_seconds", "One pass of the scheduler.", buckets=_SECONDS, registry=self.registry
        )
        self.runners = Gauge("microvm_runners", "Runners by state.", ["state"], registry=self.registry)
        self.vms = Gauge("microvm_vms", "VMs of this host.", registry=self.registry)
        self.room = Gauge("microvm_room_vms", "VMs this host could still take.", registry=self.registry)
        self.rss = Gauge("microvm_service_rss_bytes", "Memory of the service itself.", registry=self.registry)


class DeliveryCounters:
    """What the receiver counts, as metrics; all words come from small fixed sets."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def refused(self, code: str) -> None:
        self._metrics.deliveries.labels("", code).inc()

    def accepted(self, event: str, outcome: str) -> None:
        self._metrics.deliveries.labels(event, outcome).inc()
