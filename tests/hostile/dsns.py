"""The matrix of DSNs as data: each way to say where a store is, who we are and by which proof.

A form says it of a `Place`, in a file or in the environment too, where libpq looks for it. Sockets, which a server has to offer,
are `tests/unit/spark/test_sockets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import make_conninfo

DATABASE = "o'ld \\ d%41\"?&=/#é ☂"
"""What a database's name begins with: whatever ends a value, a word or a part in one of the forms."""

PASSWORD = "p:a\\s@ /?%20&='\"é"


@dataclass(frozen=True)
class Place:
    """A store as a role reaches it; `side` is the name of its service."""

    side: str
    port: str
    database: str
    user: str


@dataclass(frozen=True)
class Form:
    """A way to write DSNs: the DSN of a place, and the environment and files that belong to it."""

    name: str
    dsn: Callable[[Place], str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """`{folder}` is where the files are; `{port}` and `{user}` are those of either store."""
    carries: bool = False
    """Whether a table is carried by it: by one form of each source from which libpq takes its words. `check` opens every kind of
    session by every form."""


def keywords(place: Place, **words: str) -> str:
    """Return a DSN of keywords and values with a role and a database; an empty word is left out."""
    whole = {"host": "127.0.0.1", "port": place.port, "dbname": place.database, "user": place.user, "password": PASSWORD, **words}
    return make_conninfo("", **{name: value for name, value in whole.items() if value})


def uri(place: Place, hosts: str, more: str = "") -> str:
    """Return a DSN as a URI."""
    user, password, database = (quote(part, safe="") for part in (place.user, PASSWORD, place.database))
    return f"postgresql://{user}:{password}@{hosts}/{database}{more}"


def write_files(folder: Path, places: tuple[Place, ...]) -> None:
    """Write the service file, with a service for each place, and the password file."""
    services = (f"[{p.side}]\nhost=localhost\nport={p.port}\nuser={p.user}\ndbname={p.database}\n" for p in places)
    (folder / "services").write_text("".join(services), encoding="utf-8")
    proof = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    passwords = folder / "passwords"
    passwords.write_text("".join(f"*:{p.port}:*:{p.user}:{proof}\n" for p in places), encoding="utf-8")
    passwords.chmod(0o600)


PASSWORDS = {"PGPASSFILE": "{folder}/passwords"}
SERVICES = {"PGSERVICEFILE": "{folder}/services", **PASSWORDS}

FORMS = (
    Form("keywords", keywords),
    Form("uri", lambda place: uri(place, f"127.0.0.1:{place.port}", "?connect_timeout=7&options=-c%20DateStyle%3DGerman")),
    Form("service", lambda place: f"service={place.side}", SERVICES, carries=True),
    Form("password file", lambda place: keywords(place, password="", host="", hostaddr="127.0.0.1"), PASSWORDS),
    Form("environment", lambda place: make_conninfo("", dbname=place.database),
         {"PGHOST": "localhost", "PGPORT": "{port}", "PGUSER": "{user}", "PGPASSWORD": PASSWORD}, carries=True),
    Form("hosts", lambda place: keywords(place, host="127.0.0.1,localhost", port=f"1,{place.port}",
                                         target_session_attrs="read-write")),
    Form("hosts of a uri", lambda place: uri(place, f"127.0.0.1:1,localhost:{place.port}", "?target_session_attrs=primary"),
         carries=True),
    Form("address beside a name", lambda place: keywords(place, host="not-resolved.invalid", hostaddr="127.0.0.1")),
)  # fmt: skip
