"""Operation: what limits, tokens, audits, frozen machines and re-runs need."""

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Every statement adds; nothing that an older service wrote is changed."""
