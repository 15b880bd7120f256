"""Repositories that were heard of, what is known of their commits, the bakes of their parents; a runner's parent."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runners", sa.Column("parent", sa.Text))
    op.create_table(
        "repositories",
        sa.Column("forge", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("repo", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.Column("default_branch", sa.Text),
        sa.Column("used_at", sa.Double),
        sa.Column("moved_at", sa.Double),
        sa.Column("trouble", sa.Text),
    )
    op.create_index("ix_repositories_seen", "repositories", ["seen_at"])
    op.create_table(
        "heads",
        sa.Column("forge", sa.Text, primary_key=True),
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("commit_id", sa.Text, primary_key=True),
        sa.Column("branch", sa.Text, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_heads_at", "heads", ["at"])
    op.create_table(
        "commit_keys",
        sa.Column("forge", sa.Text, primary_key=True),
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("commit_id", sa.Text, primary_key=True),
        sa.Column("base_digest", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_commit_keys_at", "commit_keys", ["at"])
    op.create_table(
        "bakes",
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
    )
    under_way = sa.text("state IN ('queued', 'baking')")
    op.create_index(
        "uq_bakes_under_way",
        "bakes",
        ["host", "forge", "repository", "key"],
        unique=True,
        sqlite_where=under_way,
        postgresql_where=under_way,
    )
    op.create_index("ix_bakes_state", "bakes", ["host", "state", "due_at"])
    op.create_index("ix_bakes_repository", "bakes", ["repository", "id"])
    op.create_index("ix_bakes_ended", "bakes", ["ended_at"])


def downgrade() -> None:
    for name in ("bakes", "commit_keys", "heads", "repositories"):
        op.drop_table(name)
    op.drop_column("runners", "parent")
