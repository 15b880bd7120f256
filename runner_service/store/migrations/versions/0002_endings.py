"""What a runner's VM cost, and how it ended with the evidence."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runners", sa.Column("usage", sa.JSON))
    op.create_table(
        "endings",
        sa.Column("runner_id", sa.Text, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("exit", sa.JSON, nullable=False),
    )
    op.create_index("ix_endings_at", "endings", ["at"])


def downgrade() -> None:
    op.drop_table("endings")
    op.drop_column("runners", "usage")
