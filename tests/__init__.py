"""Tests of everything; they mirror the packages."""
