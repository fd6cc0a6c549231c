"""Faults of every part, one after the other, under load; started by `make chaos` alone (docs/reliability.md)."""
