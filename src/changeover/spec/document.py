"""What a spec file may hold: models that read it, and that its JSON schema is generated from (pure).

A model's description stands in the schema, where editors show it, and in the sentence for a key that is missing. `problem` is
the sentence for a value that the model refuses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, json

SLOT, TRIGGER = ("slot", "trigger")
"""How changes are captured: by logical decoding, or by triggers that write a log."""


def _rule(pattern: str, problem: str, description: str, min_length: int = 0) -> Meta:
    """Return the rule that a text matches the whole pattern, with the sentence for one that does not.

    A pattern ends where nothing follows: for Python, `$` would also stand before a last line break.
    """
    whole = rf"^(?:{pattern})(?![\s\S])"
    return Meta(pattern=whole, min_length=min_length, description=description, extra={"problem": problem})


Text = Annotated[str, Meta(min_length=1)]
Dsn = Annotated[Text, Meta(description='a DSN without a password, or "env:NAME" for the variable that holds one')]
Folder = Annotated[Text, Meta(description="a folder, relative to the spec's own")]
Names = Annotated[tuple[Text, ...], Meta(extra={"problem": "must be a list of names"})]

# A migration's name becomes part of a slot's name, whose characters PostgreSQL restricts.
Name = Annotated[
    str,
    _rule(
        "[a-z][a-z0-9_]{0,39}",
        "must be lower-case letters, digits and underscores, begin with a letter, 40 at most",
        "a name of lower-case letters, digits and underscores",
        min_length=1,
    ),
]

Function = Annotated[
    str,
    _rule(
        r"[\w.]+:\w+",
        'must be "package.module:function"',
        'a function from a DataFrame to a DataFrame, as "package.module:function"',
    ),
]

# A column of tenants is a kind of the flag's contexts, whose letters the SDK restricts.
Kind = Annotated[
    str,
    _rule(
        r"(?!(?:kind|multi)(?![\s\S]))[-A-Za-z0-9._]+",
        'is "{}": LaunchDarkly has no kind of context by that name',
        "the source column whose value is a row's tenant; without it all rows move at once",
    ),
]

# Rights on the work folder, in octal as chmod has them; its owner has them all.
Rights = Annotated[
    str,
    _rule(
        "0?7[0-7]{2}",
        'is "{}": write rights in octal that leave all to the owner, such as "0750"',
        "rights on folders of ours, in octal",
    ),
]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of the file, which holds the keys that it names and no others."""


class SourceSection(Section, frozen=True):
    """The old store, a PostgreSQL database, reached by a direct connection."""

    dsn: Dsn
    capture: Annotated[
        Literal["slot", "trigger"],
        Meta(
            description="how changes are captured: by logical decoding, or by triggers that write a log",
            extra={"problem": 'is "{}": it may be slot or trigger'},
        ),
    ] = "slot"


class PostgresSection(Section, frozen=True, tag_field="kind", tag="postgres"):
    """A new store that is a PostgreSQL database."""

    dsn: Dsn


class DeltaSection(Section, frozen=True, tag_field="kind", tag="delta"):
    """A new store of Delta tables in a folder that the driver, its tasks and capture all see."""

    path: Folder


class Check(Section, frozen=True):
    """A pair of queries whose results must be equal, each run by its own side's engine."""

    name: Annotated[Text, Meta(description="what is compared, as reports say it")]
    source: Annotated[Text, Meta(description="the query that the old store runs")]
    target: Annotated[Text, Meta(description="the query that the new store runs")]


class TransformSection(Section, frozen=True):
    """How rows change on the way where expressions do not suffice."""

    function: Function | None = None


class TableSection(Section, frozen=True):
    """One table: where it comes from, where it goes, and how a row changes on the way."""

    source: Annotated[Text, Meta(description="the table in the old store, as schema.table")]
    target: Annotated[Text, Meta(description="the table in the new stores, as schema.table")]
    key: Annotated[
        Names,
        Meta(
            min_length=1,
            description="name the target's key columns",
            extra={"problem": "must be a list of names: name the target's key columns"},
        ),
    ]
    columns: Annotated[
        dict[str, Text], Meta(description="target columns, each as a Spark SQL expression over the source's row")
    ] = {}
    drop: Annotated[Names, Meta(description="source columns that stay behind")] = ()
    where: Annotated[str, Meta(description="a condition in Spark SQL: the other rows stay behind")] | None = None
    transform: TransformSection = TransformSection()
    check: Annotated[tuple[Check, ...], Meta(extra={"problem": "must be [[table.check]] sections"})] = ()
    reverse: Annotated[
        dict[str, Text], Meta(description="source columns, each as a Spark SQL expression over the target's row")
    ] = {}
    sensitive: Annotated[Names, Meta(description="source columns whose values are shown nowhere")] = ()


class Flag(Section, frozen=True):
    """The migration flag: its key, the target that takes over, and the data file of the SDK's file source.

    `context` is the source column whose value is a row's tenant, the flag's context; without it all rows move at once.
    """

    key: Annotated[Text, Meta(description="the migration flag's key")]
    target: Annotated[Text, Meta(description="the target that takes over, a PostgreSQL one")]
    file: Annotated[str, Meta(description="the data file of the SDK's file source")] | None = None
    context: Kind | None = None


class ApplicationSection(Section, frozen=True):
    """The application that uses the stores."""

    roles: Annotated[Names, Meta(description="the roles by which the application uses the stores")] = ()


class WorkSection(Section, frozen=True):
    """Where changeover keeps what it needs for the migration."""

    path: Folder
    mode: Rights = "0700"


class LedgerSection(Section, frozen=True):
    """The ledger's database, where no target is a PostgreSQL store."""

    dsn: Dsn


TargetSection = Annotated[
    PostgresSection | DeltaSection, Meta(extra={"problem": 'is "{0[kind]}": known are "postgres" and "delta"'})
]


class Document(Section, frozen=True):
    """A migration, as a spec of changeover."""

    name: Name
    source: SourceSection
    target: Annotated[
        dict[Name, TargetSection],
        Meta(
            min_length=1,
            description="the new stores by name, at least one [target.NAME] section",
            extra={"problem": "needs at least one [target.NAME] section"},
        ),
    ]
    table: Annotated[
        tuple[TableSection, ...],
        Meta(
            min_length=1,
            description="at least one [[table]] section",
            extra={"problem": "needs at least one [[table]] section"},
        ),
    ]
    work: WorkSection
    flag: Flag | None = None
    application: ApplicationSection = ApplicationSection()
    ledger: LedgerSection | None = None


NOT_CARRIED = {
    "source.read_from": "bulk reads from a replica are not carried by this version: leave it out, reads go to the primary",
}
"""Keys that a later version may know, each with what to do without it."""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec file, as `spec.schema.json` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.schema(Document)}
