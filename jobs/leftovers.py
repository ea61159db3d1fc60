"""Leftovers: what of ours is in the old store, and of the way back in the new one.

It goes by our names in the server's own catalogue, not by any record, so it also finds what a killed run left, or another
migration has. It looks only. Runs where its caller runs, without Spark.
"""

from __future__ import annotations

import time

from changeover.jobs import wayback
from changeover.session import application_name, connect
from changeover.spec import Spec

SESSION = "session "
SESSION_SECONDS = 5.0

LEFTOVERS = """
SELECT 'replication slot ' || slot_name FROM pg_replication_slots WHERE slot_name LIKE 'changeover%'
UNION ALL SELECT 'publication ' || pubname FROM pg_publication WHERE pubname LIKE 'changeover%'
UNION ALL SELECT format('trigger %s on %s', tgname, tgrelid::regclass) FROM pg_trigger WHERE tgname LIKE 'changeover%'
UNION ALL SELECT format('%s in schema changeover', relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'changeover'
UNION ALL SELECT format('function changeover.%s', proname) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = 'changeover'
UNION ALL SELECT 'schema changeover' FROM pg_namespace WHERE nspname = 'changeover'
UNION ALL SELECT format('session %s', application_name) FROM pg_stat_activity
    WHERE application_name LIKE 'changeover:%' AND pid <> pg_backend_pid() AND datname = current_database()
"""


def leftovers(spec: Spec) -> list[str]:
    """Return everything of ours that is still in the old store, and what is left of the reverse path (driver; looks only).

    Where it is sessions alone it looks again for a while: the server ends one a little after its client has gone.
    """
    deadline = time.monotonic() + SESSION_SECONDS
    while (left := _left(spec)) and all(one.startswith(SESSION) for one in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _left(spec: Spec) -> list[str]:
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "leftovers")) as old:
        left = [row[0] for row in old.execute(LEFTOVERS).fetchall()]
    return left + [one for one in wayback.leftovers(spec) if one not in left]
