"""What a spec file may hold: models that read it, and that its JSON schema is generated from (pure).

A model's description stands in the schema, where editors show it, and in the sentence for a key that is missing. `problem` is
the sentence for a value that the model refuses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, json

SLOT, TRIGGER = ("slot", "trigger")
"""How changes are captured: by logical decoding, or by triggers that write a log."""

STREAM, APPLICATION = ("stream", "application")
"""What brings a write to the other store: the store's change stream, or the application's own process too."""


def _rule(pattern: str, problem: str, min_length: int | None = None) -> Meta:
    """Return the rule that a text matches the whole pattern, with the sentence for one that does not.

    A pattern ends where nothing follows: for Python, `$` would also stand before a last line break.
    """
    return Meta(pattern=rf"^(?:{pattern})(?![\s\S])", min_length=min_length, extra={"problem": problem})


Text = Annotated[str, Meta(min_length=1)]
Names = Annotated[tuple[Text, ...], Meta(extra={"problem": "must be a list of names"})]

# A migration's name becomes part of a slot's name, whose characters PostgreSQL restricts.
NAME = _rule(
    "[a-z][a-z0-9_]{0,39}",
    "must be lower-case letters, digits and underscores, begin with a letter, 40 at most",
    min_length=1,
)
FUNCTION = _rule(r"[\w.]+:\w+", 'must be "package.module:function"')

# A column of tenants is a kind of the flag's contexts, whose letters the SDK restricts.
KIND = _rule(
    r"(?!(?:kind|multi)(?![\s\S]))[-A-Za-z0-9._]+",
    'is "{}": LaunchDarkly has no kind of context by that name',
)

# Rights on the work folder, in octal as chmod has them; its owner has them all.
# Not repeated where it is wrong: it may be the secret itself.
VARIABLE = _rule(
    "env:[A-Za-z_][A-Za-z0-9_]*",
    'names no environment variable: write "env:NAME", whose value is the secret',
)
RIGHTS = _rule("0?7[0-7]{2}", 'is "{}": write rights in octal that leave all to the owner, such as "0750"')


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of the file, which holds the keys that it names and no others."""


class SourceSection(Section, frozen=True):
    """The old store, a PostgreSQL database."""

    dsn: Annotated[
        Text,
        Meta(
            description="A direct connection, not a transaction pooler. `env:NAME` takes it from an environment variable. "
            "A DSN with a password in it is refused."
        ),
    ]
    capture: Annotated[
        Literal["slot", "trigger"],
        Meta(
            description="How changes are captured. `slot` reads PostgreSQL's change stream. `trigger` has triggers write a "
            "log, for a server that does not decode.",
            extra={"problem": 'is "{}": it may be slot or trigger'},
        ),
    ] = "slot"


class PostgresSection(Section, frozen=True, tag_field="kind", tag="postgres"):
    """The store is a PostgreSQL database."""

    dsn: Annotated[Text, Meta(description="Its connection, as that of the source.")]


class DeltaSection(Section, frozen=True, tag_field="kind", tag="delta"):
    """The store is a folder of Delta Lake tables."""

    path: Annotated[Text, Meta(description="The folder. Driver, tasks and capture must all see it.")]


class Check(Section, frozen=True):
    """A pair of queries whose results must be equal, each run by its own side's engine."""

    name: Annotated[Text, Meta(description="What the check is called in verdict and report.")]
    source: Annotated[Text, Meta(description="The query for the old store.")]
    target: Annotated[Text, Meta(description="The query for the new store.")]


class TransformSection(Section, frozen=True):
    """A transform in Python, before the expressions of `columns`."""

    function: (
        Annotated[str, FUNCTION, Meta(description="`package.module:function`, which takes a DataFrame and returns one.")] | None
    ) = None


class TableSection(Section, frozen=True):
    """One table: where it comes from, where it goes, and how a row changes on the way."""

    source: Annotated[
        Text,
        Meta(description="The table in the old store, as `schema.name`. A part with a dot in it stands in double quotes."),
    ]
    target: Annotated[Text, Meta(description="The table in the new stores. In a lake its name alone is the folder.")]
    key: Annotated[
        Names,
        Meta(
            min_length=1,
            description="The target's key columns. They must follow from the source's key.",
            extra={"problem": "must be a list of names: name the target's key columns"},
        ),
    ]
    columns: Annotated[
        dict[str, Text],
        Meta(
            description="Target column = Spark SQL expression over the source's row. A column that is not named keeps its "
            "name and type."
        ),
    ] = {}
    drop: Annotated[Names, Meta(description="Source columns that stay behind.")] = ()
    where: Annotated[str, Meta(description="A condition in Spark SQL. A row that does not meet it is not carried over.")] | None = (
        None
    )
    sensitive: Annotated[
        Names, Meta(description="Source columns whose values are shown nowhere, nor what is computed from them.")
    ] = ()
    reverse: Annotated[
        dict[str, Text],
        Meta(
            description="Source column = Spark SQL expression over the target's row, for reverse replication. A column that "
            "was only renamed goes back by itself."
        ),
    ] = {}
    transform: TransformSection = TransformSection()
    check: Annotated[
        tuple[Check, ...],
        Meta(
            description="Pairs of queries whose results must be equal. Each store's own engine runs its query.",
            extra={"problem": "must be [[table.check]] sections"},
        ),
    ] = ()


class Flag(Section, frozen=True):
    """The migration flag. Without it there is no handover."""

    key: Annotated[Text, Meta(description="The flag's key in LaunchDarkly's terms.")]
    target: Annotated[Text, Meta(description="The name of the target that takes over. It must be a PostgreSQL one.")]
    file: (
        Annotated[str, Meta(description="The data file of the LaunchDarkly SDK. Without it a router needs a client of yours.")]
        | None
    ) = None
    context: (
        Annotated[
            str,
            KIND,
            Meta(description="The source column whose value is a row's tenant. With it tenants may move one after the other."),
        ]
        | None
    ) = None
    private: (
        Annotated[
            str,
            VARIABLE,
            Meta(
                description="`env:NAME`, a secret of your own. With it your client never sends a tenant's value to LaunchDarkly. "
                "A context's key is a keyed hash of the value, which is the private attribute `tenant`."
            ),
        ]
        | None
    ) = None
    mirror: Annotated[
        Literal["stream", "application"],
        Meta(
            description="What brings a write to the other store. `stream`: capture and replay, and nothing happens in the "
            "application. `application`: the router as well, from a process of the application, which needs mappings."
        ),
    ] = "stream"


class ApplicationSection(Section, frozen=True):
    """How your application uses the stores."""

    roles: Annotated[
        Names,
        Meta(description="The roles by which it connects. `prepare` grants them what they need on what it makes."),
    ] = ()


class WorkSection(Section, frozen=True):
    """The work folder, which holds spool, differences, logs and scratch files."""

    path: Annotated[Text, Meta(description="The folder. Driver, tasks and capture must all see it.")]
    mode: Annotated[
        str,
        RIGHTS,
        Meta(
            description="Its rights in octal, such as `0750`. The owner has them all. A folder that is there already keeps its own."
        ),
    ] = "0700"


class LedgerSection(Section, frozen=True):
    """The ledger's database, where no target is PostgreSQL. Otherwise the ledger stands beside the PostgreSQL target."""

    dsn: Annotated[Text, Meta(description="Its connection, as that of the source.")]


class Document(Section, frozen=True, kw_only=True):
    """One migration, as one TOML file."""

    name: Annotated[
        str,
        NAME,
        Meta(
            description="The migration's name. It is part of the names of slot, publication and sessions. Lower-case "
            "letters, digits and underscores, a letter first, 40 characters at most."
        ),
    ]
    source: SourceSection
    target: Annotated[
        dict[
            Annotated[str, NAME],
            Annotated[PostgresSection | DeltaSection, Meta(extra={"problem": 'is "{}": known are "postgres" and "delta"'})],
        ],
        Meta(
            min_length=1,
            description="The new stores: one section each, under a name that you choose. At most one may be PostgreSQL.",
            extra={"problem": "needs at least one [target.NAME] section"},
        ),
    ]
    table: Annotated[
        tuple[TableSection, ...],
        Meta(
            min_length=1,
            description="The tables that move: one section each.",
            extra={"problem": "needs at least one [[table]] section"},
        ),
    ]
    flag: Flag | None = None
    application: ApplicationSection = ApplicationSection()
    work: WorkSection
    ledger: LedgerSection | None = None


NOT_CARRIED = {
    "source.read_from": "bulk reads from a replica are not carried by this version: leave it out, reads go to the primary",
}
"""Keys that a later version may know, each with what to do without it."""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec file, as `spec.schema.json` holds it."""
    sections = json.schema(Document)["$defs"]
    for tagged in (sections["PostgresSection"], sections["DeltaSection"]):
        tagged["properties"]["kind"]["description"] = tagged["description"]
    whole = {**sections.pop("Document"), "title": "changeover spec"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": sections}
