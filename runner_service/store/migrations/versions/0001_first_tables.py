"""The first tables: jobs, runners, inbox, timeline, hosts, locks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
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
    )
    op.create_index("ix_jobs_demand", "jobs", ["state", "group_key", "event_at"])
    op.create_index("ix_jobs_updated", "jobs", ["updated_at"])
    op.create_table(
        "runners",
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
        sa.Column("vm_id", sa.Text),
        sa.Column("remote_id", sa.Text),
        sa.Column("deregistered", sa.Boolean, nullable=False),
        sa.Column("waits_for", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("exit_code", sa.Integer),
        sa.Column("ended_at", sa.Double),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Double),
    )
    op.create_index("ix_runners_state", "runners", ["state"])
    op.create_index("ix_runners_job", "runners", ["job_id"])
    op.create_index("ix_runners_serving", "runners", ["serving_job_id"])
    op.create_index("ix_runners_vm", "runners", ["vm_id"])
    op.create_index("ix_runners_ended", "runners", ["ended_at"])
    op.create_table(
        "inbox",
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
    )
    op.create_index("ix_inbox_pending", "inbox", ["processed_at", "seq"])
    op.create_table(
        "timeline",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("job_id", sa.Text),
        sa.Column("runner_id", sa.Text),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("waits_for", sa.Text),
        sa.Column("ms", sa.Double),
    )
    op.create_index("ix_timeline_job", "timeline", ["job_id", "seq"])
    op.create_index("ix_timeline_runner", "timeline", ["runner_id", "seq"])
    op.create_index("ix_timeline_at", "timeline", ["at"])
    op.create_table(
        "hosts",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("max_vms", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("draining", sa.Boolean, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.create_table(
        "locks",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Double),
    )
    locks = sa.table("locks", sa.column("name", sa.Text))
    op.bulk_insert(locks, [{"name": "scheduler"}])


def downgrade() -> None:
    for name in ("locks", "hosts", "timeline", "inbox", "runners", "jobs"):
        op.drop_table(name)
