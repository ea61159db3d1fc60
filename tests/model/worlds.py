"""Every world that the model explores, by name, as data: what the application does, what may die, who else is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from changeover.position import Version
from tests.model.environment import Environment, Surroundings
from tests.model.kernel import Explored, World, explore
from tests.model.lake import Lake
from tests.model.moves import NEW, OLD, Moving
from tests.model.offers import Offers
from tests.model.orders import Orders
from tests.model.rates import Rates
from tests.model.rules import RULES, Rules
from tests.model.script import REWRITE, TRUNCATE, Script, aborted, gone, move, put, tx
from tests.model.source_worlds import SOURCES
from tests.model.table_worlds import TABLES

K, J = put("k", "1", "L"), put("j", "1", "J")
"""The rows with which most worlds begin."""


def script(*transactions: object, prepared: int = 1, **target_key: str) -> Script:
    """Return a script; keyword arguments are source keys with another target key."""
    return Script(transactions, prepared, target_key)  # type: ignore[arg-type]


def beyond(rules: Rules) -> Offers:
    """Rows outside of the sampled keys, in the ranges that the product makes of the sample's bounds."""
    keys = ("a", "c", "p", "z")
    ranges = rules.ranges([("m",)])
    chunks = tuple(
        tuple(key for key in keys if (low is None or (key,) >= low) and (high is None or (key,) < high)) for low, high in ranges
    )
    whole = script(tx(*(put(key, "1", "L") for key in keys)), tx(put("c", "2", "L")), tx(gone("z")))
    return Offers("beyond the sampled bounds", whole, rules, chunks=chunks, direct=False)


BOTH: Any = {"chunks": (("k",), ("j",))}
"""A chunk for each of two keys."""

OFFERS = (
    Offers("ghost", script(tx(K), tx(gone("k")), tx(put("k", "2", "M")), tx(gone("k"))), attempts=2, kills=1),
    Offers("updates", script(tx(K), tx(put("k", "2", "L"), J), tx(put("k", "3", "L")), tx(gone("j"))), **BOTH),
    Offers("late below L0", script(tx(K), tx(gone("k")), tx(J), tx(put("j", "2", "L")), prepared=2)),
    Offers("key changes", script(tx(K), tx(move("k", "j", "2", "L")), tx(put("k", "9", "M")), tx(move("j", "i", "3", "L")))),
    Offers("one target key", script(tx(K), tx(move("k", "K", "2")), tx(put("K", "3")), K="k"), kills=1),
    Offers("TRUNCATE", script(tx(K, J), tx(put("k", "2", "L")), tx(TRUNCATE, put("j", "5", "L")), tx(put("i", "3", "L"))), kills=1),
    Offers("unsent", script(tx(K), tx(put("k", "2")), tx(put("k", "3", "M")), tx(put("k", "4"))), kills=1),
    Offers("unsent, fuzzy", script(tx(K), tx(put("k", "2")), tx(put("k", "3", "M")), tx(put("k", "4"))), fuzzy=True, attempts=2),
    Offers("unsent, moved", script(tx(K), tx(move("k", "j", "2")), tx(put("k", "9", "N")), tx(put("j", "3"))), **BOTH, kills=1),
    Offers("unsent, moved, fuzzy", script(tx(K), tx(move("k", "j", "2")), tx(put("k", "9", "N"))), **BOTH, fuzzy=True, kills=1),
    Offers("unsent, onto a freed key", script(tx(K, J), tx(gone("j")), tx(move("k", "j", "2")), tx(put("k", "9", "N"))), **BOTH),
    Offers("unsent, onto a freed key, fuzzy", script(tx(K, J), tx(gone("j")), tx(move("k", "j", "2"))), **BOTH, fuzzy=True),
    Offers("capture", script(tx(K), tx(put("k", "2", "L")), tx(gone("k")), tx(put("k", "3", "L"))), capture=True, kills=2),
    Offers(
        "collection", script(tx(K), tx(gone("k")), tx(J), tx(put("k", "3", "L")), tx(gone("k"))),
        loaded=True, collect=(Version(0, 20, 0), Version(0, 40, 0)), kills=1,
    ),
    Offers("collection asked for early", script(tx(K, J), tx(gone("k"))), **BOTH, collect=(Version(0, 20, 0),)),
    Offers("rolled back", script(tx(K), aborted(J), tx(put("k", "2", "L")))),
    Offers("TRUNCATE, then rewritten", script(tx(K, J), tx(TRUNCATE), REWRITE, tx(put("k", "2", "L"))), **BOTH, kills=1),
    Offers("two TRUNCATEs", script(tx(K), tx(J, TRUNCATE, put("k", "3", "L")), tx(TRUNCATE), tx(put("i", "1", "I"))), kills=1),
    Offers("rewritten", script(tx(K, J), REWRITE, tx(put("k", "2", "L"))), **BOTH),
    Offers("fuzzy, beside a row that nobody writes", script(tx(K, J), tx(put("k", "2", "L"))), **BOTH, fuzzy=True),
    Offers(
        "fuzzy", script(tx(K, J), tx(gone("k")), tx(put("k", "2", "L")), tx(put("j", "2", "J"))), **BOTH,
        fuzzy=True, attempts=2,
    ),
    Offers(
        "unsent, onto a freed key that is used again, fuzzy",
        script(tx(K, J), tx(gone("j")), tx(move("k", "j", "2")), tx(put("k", "9", "N"))), **BOTH, fuzzy=True, kills=1,
    ),
)  # fmt: skip

LAKES = (
    Lake("lake", script(tx(K, J, put("i", "1", "I")), tx(gone("k")), tx(put("j", "2", "J")))),
    Lake(
        "lake, truncated",
        script(tx(K, J), tx(gone("k"), put("n", "2", "N")), tx(TRUNCATE, put("j", "3", "J")), tx(put("i", "1", "I"))),
    ),
    Lake("lake, three attempts", script(tx(K, J), tx(gone("k")), tx(put("j", "2", "J"))), attempts=3),
)

ORDERS = (
    Orders("orders", script(tx(K), tx(gone("k")), tx(put("k", "2", "L"), J), tx(move("k", "i", "2", "L")), tx(gone("j")))),
    Orders("orders, one target key", script(tx(K), tx(move("k", "K", "2", "L")), tx(J), tx(gone("j")), K="k")),
    Orders("orders of unsent values, apart", script(tx(K), tx(put("k", "2")), tx(put("k", "3", "M")), tx(move("k", "j", "5")))),
    Orders(
        "orders of unsent values",
        script(tx(K), tx(put("k", "2")), tx(put("k", "3", "M")), tx(put("k", "4")), tx(move("k", "j", "5"))),
        together=True, times=3,
    ),
)  # fmt: skip

A, B = ("a",), ("b",)
"""The two tenants by name; one that no move names is among the others."""

MOVES = (
    Moving("there", (("1", None, "3"),), moves=((NEW, None),)),
    Moving("there and back", (("1", "2", None),)),
    Moving("one tenant of two", (("1", "2"), ("1", "2")), moves=((NEW, A),), direct=False),
    Moving("one tenant of two, written to both stores", (("1",), ("1",)), moves=((NEW, A),)),
    Moving("one tenant there and back", (("1", "2"), ("1",)), moves=((NEW, A), (OLD, A)), direct=False),
    Moving("a second tenant while the first is away", (("1", "2"), ("1",)), moves=((NEW, A), (NEW, B), (OLD, A)), direct=False),
    Moving("the rest, and one comes back", (("1", "2"), ("1",)), moves=((NEW, A), (NEW, None), (OLD, B)), direct=False),
    Moving("tenants called off", (("1", "2"), ("1",)), moves=((NEW, A), (OLD, A)), direct=False, calls_off=1),
    Moving("there and back by direct writes", (("1", "2", None, "4"),), reverse=False),
    Moving("called off", (("1", "2", "3"),), moves=((NEW, None),), calls_off=1),
    Moving("called off there or back", (("1", "2"),), reverse=False, calls_off=1),
    Moving("rogue", (("1", "2", None),), moves=((NEW, None),), direct=False, rogue=True),
)

WRITTEN = script(tx(put("a", "1.0055"), put("b", "2.0055")), tx(put("a", "3.0055")), tx(gone("b")))

ENVIRONMENTS = (
    Environment("definition", WRITTEN, Surroundings(definition=2)),
    Environment("filter", WRITTEN, Surroundings(filter=2)),
    Environment("type", WRITTEN, Surroundings(type=1), fences=False),
    Environment("timeouts", WRITTEN, Surroundings(timeout=2)),
    Environment("all", WRITTEN, Surroundings(definition=2, filter=1, type=1, timeout=1), fences=False),
)

Maker = Callable[[Rules], World[Any]]


def _with_rules(world: Any) -> Maker:
    return lambda rules: replace(world, rules=rules)


def _statements(make: Callable[[Rules], Any]) -> Maker:
    return lambda rules: make(rules).world()


WORLDS: Mapping[str, Maker] = {
    **{f"statements: {make(RULES).name}": _statements(make) for make in TABLES.values()},
    **{f"statements: {make(RULES).name}": make for make in SOURCES.values()},
    **{f"offers: {world.name}": _with_rules(world) for world in (*OFFERS, *ORDERS)},
    "offers: beyond the sampled bounds": beyond,
    **{f"lake: {world.name}": _with_rules(world) for world in LAKES},
    **{f"authority: {world.name}": _with_rules(world) for world in MOVES},
    **{f"environment: {world.name}": _with_rules(world) for world in ENVIRONMENTS},
    "rates: catching up": _with_rules(Rates("catching up")),
}
"""What each world is called, and how it is made for given rules."""


@cache
def explored(name: str) -> Explored:
    """Explore a world under the product's rules, once."""
    return explore(WORLDS[name](RULES))
