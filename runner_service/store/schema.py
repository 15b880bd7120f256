"""The tables of the control plane. SQLite by default; every column and query also holds on PostgreSQL.

Times are Unix seconds. Columns named lease_* make a row exclusively one service's until ``lease_until``.
There are no foreign keys on purpose: old rows of each table are forgotten by age, each at its own pace.
"""

import sqlalchemy as sa

HEAD = "0004"
"""The migration these tables correspond to; a test holds it equal to alembic's head."""

metadata = sa.MetaData()

# Literals, so that both databases see that a query's condition is that of the index. The columns that it fixes are in
# the index all the same: without statistics SQLite prefers the index that has most of a condition's columns.
HELD = sa.text("state = 'queued' AND group_key IS NULL AND template IS NOT NULL")
FRUITLESS = sa.text("state = 'gone' AND serving_job_id IS NULL AND code IN ('runner_exited', 'late_idle')")

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("forge", sa.Text, nullable=False),
    sa.Column("forge_job_id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("scope_kind", sa.Text, nullable=False),
    sa.Column("scope_path", sa.Text, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("event_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("workflow", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("run_attempt", sa.Integer, nullable=False),
    sa.Column("head_sha", sa.Text, nullable=False),
    sa.Column("head_branch", sa.Text, nullable=False),
    sa.Column("conclusion", sa.Text),
    sa.Column("template", sa.Text),
    sa.Column("group_key", sa.Text),
    sa.Column("waits_for", sa.Text),
    sa.Column("runner_id", sa.Text),
    sa.Column("runner_name", sa.Text),
    sa.Column("created_at", sa.Double),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.UniqueConstraint("forge", "forge_job_id", name="uq_jobs_forge"),
    sa.Index("ix_jobs_demand", "state", "group_key", "owner", "repo", "event_at"),
    sa.Index("ix_jobs_held", "state", "group_key", "event_at", sqlite_where=HELD, postgresql_where=HELD),
    sa.Index("ix_jobs_updated", "updated_at"),
)

runners = sa.Table(
    "runners",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("forge", sa.Text, nullable=False),
    sa.Column("scope_kind", sa.Text, nullable=False),
    sa.Column("scope_path", sa.Text, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("group_key", sa.Text, nullable=False),
    sa.Column("template", sa.Text, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("state_at", sa.Double, nullable=False),
    sa.Column("deadline", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("event_at", sa.Double, nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("serving_job_id", sa.Text),
    sa.Column("job_done_at", sa.Double),
    sa.Column("cancelled_at", sa.Double),
    sa.Column("killed_at", sa.Double),
    sa.Column("host", sa.Text),
    sa.Column("digest", sa.Text),
    sa.Column("parent", sa.Text),
    sa.Column("vm_id", sa.Text),
    sa.Column("remote_id", sa.Text),
    sa.Column("deregistered", sa.Boolean, nullable=False),
    sa.Column("waits_for", sa.Text),
    sa.Column("code", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("infra", sa.Text),
    sa.Column("usage", sa.JSON(none_as_null=True)),
    sa.Column("ended_at", sa.Double),
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("vcpus", sa.Integer, nullable=False, server_default="1"),
    sa.Index("ix_runners_state", "state"),
    sa.Index(
        "ix_runners_fruitless",
        "state",
        "code",
        "ended_at",
        sqlite_where=FRUITLESS,
        postgresql_where=FRUITLESS,
    ),
    sa.Index("ix_runners_job", "job_id"),
    sa.Index("ix_runners_serving", "serving_job_id"),
    sa.Index("ix_runners_vm", "vm_id"),
    sa.Index("ix_runners_ended", "ended_at"),
)

endings = sa.Table(
    "endings",
    metadata,
    sa.Column("runner_id", sa.Text, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("exit", sa.JSON, nullable=False),
    sa.Index("ix_endings_at", "at"),
)

inbox = sa.Table(
    "inbox",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("forge", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("action", sa.Text),
    sa.Column("hook_id", sa.Text),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("processed_at", sa.Double),
    sa.Column("outcome", sa.Text),
    sa.UniqueConstraint("forge", "id", name="uq_inbox_delivery"),
    sa.Index("ix_inbox_pending", "processed_at", "seq"),
)

timeline = sa.Table(
    "timeline",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("runner_id", sa.Text),
    sa.Column("step", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("waits_for", sa.Text),
    sa.Column("ms", sa.Double),
    sa.Index("ix_timeline_job", "job_id", "seq"),
    sa.Index("ix_timeline_runner", "runner_id", "seq"),
    sa.Index("ix_timeline_at", "at"),
)

hosts = sa.Table(
    "hosts",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("max_vms", sa.Integer, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("cpus", sa.Integer, nullable=False, server_default="0"),
    sa.Column("drain_ordered_at", sa.Double),
)

repositories = sa.Table(
    "repositories",
    metadata,
    sa.Column("forge", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("default_branch", sa.Text),
    sa.Column("used_at", sa.Double),
    sa.Column("moved_at", sa.Double),
    sa.Column("trouble", sa.Text),
    sa.Index("ix_repositories_seen", "seen_at"),
)

# Commits that were seen at the head of a branch of the repository itself, and the dependency keys of commits.
heads = sa.Table(
    "heads",
    metadata,
    sa.Column("forge", sa.Text, primary_key=True),
    sa.Column("repository", sa.Text, primary_key=True),
    sa.Column("commit_id", sa.Text, primary_key=True),
    sa.Column("branch", sa.Text, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index("ix_heads_at", "at"),
)

commit_keys = sa.Table(
    "commit_keys",
    metadata,
    sa.Column("forge", sa.Text, primary_key=True),
    sa.Column("repository", sa.Text, primary_key=True),
    sa.Column("commit_id", sa.Text, primary_key=True),
    sa.Column("base_digest", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index("ix_commit_keys_at", "at"),
)

_UNDER_WAY = sa.text("state IN ('queued', 'baking')")

# Each host bakes for itself: a parent is files of its own pool.
bakes = sa.Table(
    "bakes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("forge", sa.Text, nullable=False),
    sa.Column("repository", sa.Text, nullable=False),
    sa.Column("branch", sa.Text, nullable=False),
    sa.Column("commit", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("base_digest", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("due_at", sa.Double, nullable=False),
    sa.Column("force", sa.Boolean, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("ended_at", sa.Double),
    sa.Column("pid", sa.Integer),
    sa.Column("start_ticks", sa.BigInteger),
    sa.Column("digest", sa.Text),
    sa.Column("cache_hit", sa.Boolean),
    sa.Column("incremental", sa.Boolean),
    sa.Column("seconds", sa.Double),
    sa.Column("steps", sa.JSON, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("step", sa.Text),
    sa.Column("message", sa.Text),
    sa.Column("advice", sa.Text),
    sa.Column("output", sa.JSON, nullable=False),
    sa.Index(
        "uq_bakes_under_way", "host", "forge", "repository", "key",
        unique=True, sqlite_where=_UNDER_WAY, postgresql_where=_UNDER_WAY,
    ),
    sa.Index("ix_bakes_state", "host", "state", "due_at"),
    sa.Index("ix_bakes_repository", "repository", "id"),
    sa.Index("ix_bakes_ended", "ended_at"),
)  # fmt: skip

# One row a mutual exclusion: touching it first in a transaction serialises deciders on every database.
locks = sa.Table(
    "locks",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", sa.Double),
)

# Up to when something outside was looked through: what came later is looked for next time, also after a restart.
sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("until", sa.Double, nullable=False),
)

# What operators did. Rows are added and never changed; those who may do that have the database anyway.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("used_at", sa.Double),
    sa.UniqueConstraint("digest", name="uq_tokens_digest"),
)

# Jobs whose infrastructure failed under them, and what came of running them once more. A forge's word changes nothing.
infra_failures = sa.Table(
    "infra_failures",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("runner_id", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("rerun", sa.Text, nullable=False),
    sa.Column("rerun_why", sa.Text, nullable=False),
    sa.Column("rerun_job_id", sa.Text),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("next_at", sa.Double),
    sa.Column("deadline", sa.Double),
    sa.Index("ix_infra_failures_rerun", "rerun", "next_at"),
    sa.Index("ix_infra_failures_at", "at"),
)

# VMs of failed jobs that are kept frozen, each in the pool of its host; ``id`` is the VM's.
frozen = sa.Table(
    "frozen",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("runner_id", sa.Text, nullable=False),
    sa.Column("repository", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("digest", sa.Text),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("removed_at", sa.Double),
    sa.Column("why", sa.Text),
    sa.Index("ix_frozen_host", "host", "state"),
    sa.Index("ix_frozen_job", "job_id"),
    sa.Index("ix_frozen_removed", "removed_at"),
)
