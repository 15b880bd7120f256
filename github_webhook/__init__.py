"""The way in from GitHub and the way out to it. Knows no VM and no database."""
