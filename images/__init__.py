"""Turns recipes into templates."""
