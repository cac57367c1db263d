"""Fixtures that more than one room's tests use."""

from __future__ import annotations

from memory_cell import cell

__all__ = ["cell"]
