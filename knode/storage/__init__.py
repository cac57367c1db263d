"""Where things stay: SQLite, set up in one place, over the world's disk.

One database is one file and one writer; who reads much at once opens a view beside it. This room knows
no table: callers bring their migrations. It must never acknowledge what is not durable, open a file that
a newer knode wrote, or repair a damaged one silently.
"""

from knode.storage.database import Database

__all__ = ["Database"]
