"""Operation: what limits, tokens, audits, frozen machines and re-runs need."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_HELD = sa.text("state = 'queued' AND group_key IS NULL AND template IS NOT NULL")
_FRUITLESS = sa.text("state = 'gone' AND serving_job_id IS NULL AND code IN ('runner_exited', 'late_idle')")


def upgrade() -> None:
    """Every statement adds; nothing that an older service wrote is changed."""
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("used_at", sa.Double),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    op.create_table(
        "sweeps",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.add_column("runners", sa.Column("infra", sa.Text))
    op.create_table(
        "infra_failures",
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
    )
    op.create_index("ix_infra_failures_rerun", "infra_failures", ["rerun", "next_at"])
    op.create_index("ix_infra_failures_at", "infra_failures", ["at"])
    op.create_table(
        "frozen",
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
    )
    op.create_index("ix_frozen_host", "frozen", ["host", "state"])
    op.create_index("ix_frozen_job", "frozen", ["job_id"])
    op.create_index("ix_frozen_removed", "frozen", ["removed_at"])
    op.add_column("runners", sa.Column("vcpus", sa.Integer, nullable=False, server_default="1"))
    op.add_column("hosts", sa.Column("cpus", sa.Integer, nullable=False, server_default="0"))
    op.drop_index("ix_jobs_demand", "jobs")
    op.create_index("ix_jobs_demand", "jobs", ["state", "group_key", "owner", "repo", "event_at"])
    op.create_index(
        "ix_jobs_held", "jobs", ["state", "group_key", "event_at"], sqlite_where=_HELD, postgresql_where=_HELD
    )
    op.create_index(
        "ix_runners_fruitless", "runners", ["state", "code", "ended_at"],
        sqlite_where=_FRUITLESS, postgresql_where=_FRUITLESS,
    )  # fmt: skip
    op.add_column("hosts", sa.Column("drain_ordered_at", sa.Double))


def downgrade() -> None:
    op.drop_column("hosts", "drain_ordered_at")
    op.drop_index("ix_runners_fruitless", "runners")
    op.drop_index("ix_jobs_held", "jobs")
    op.drop_index("ix_jobs_demand", "jobs")
    op.create_index("ix_jobs_demand", "jobs", ["state", "group_key", "event_at"])
    op.drop_column("hosts", "cpus")
    op.drop_column("runners", "vcpus")
    op.drop_column("runners", "infra")
    for name in ("sweeps", "frozen", "infra_failures", "tokens", "audit"):
        op.drop_table(name)
