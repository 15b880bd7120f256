"""The database of the control plane: tables, named queries, migrations."""
