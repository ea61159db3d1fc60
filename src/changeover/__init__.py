"""Move a live table to another store while the application keeps reading and writing.

Importing this package reads no environment, opens no connection and starts no Spark session; the parts are imported by
name, as in ``from changeover.api import Router``.
"""

from __future__ import annotations

__version__ = "0.1.0"
