"""Runs, snapshots, forks and destroys microVMs on this host. Knows nothing of CI."""
