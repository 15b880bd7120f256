"""The programs behind the scripts."""
