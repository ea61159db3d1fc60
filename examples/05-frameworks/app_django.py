"""An application on Django: a database for each store, and Django's router that knows where a unit of work is. Until SIGTERM."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import uuid
from collections import Counter
from contextvars import ContextVar
from decimal import Decimal
from typing import Any

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

from changeover.api import Place, Router, load
from changeover.errors import ChangeoverError

PLACE: ContextVar[str] = ContextVar("place", default="old")
"""The database of this unit of work."""


class Placed:
    """Django's database router: every model goes where the unit of work is."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        """Return the database for a read."""
        return PLACE.get()

    db_for_write = db_for_read


def database(dsn: str) -> dict[str, Any]:
    """Return a store as Django names it."""
    parts = conninfo_to_dict(dsn)
    keys = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    return {"ENGINE": "django.db.backends.postgresql", **{name: str(parts.get(key, "")) for name, key in keys.items()}}


settings.configure(
    DATABASES={"default": {}, "old": database(os.environ["OLD_DSN"]), "new": database(os.environ["NEW_DSN"])},
    DATABASE_ROUTERS=[Placed()], USE_TZ=True,
)  # fmt: skip
django.setup()

from django.db import models, transaction  # noqa: E402  (models need the settings)


class Order(models.Model):
    """An order."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    customer = models.TextField()
    placed = models.DateTimeField(auto_now_add=True)

    class Meta:
        """The table is there already."""

        app_label, db_table, managed = "shop", "orders", False


class Item(models.Model):
    """A line of an order."""

    pk = models.CompositePrimaryKey("order_id", "line")
    order = models.ForeignKey(Order, models.DO_NOTHING)
    line = models.IntegerField()
    sku = models.TextField()
    price = models.DecimalField(max_digits=12, decimal_places=2)

    class Meta:
        """The table is there already."""

        app_label, db_table, managed = "shop", "items", False


def insert(known: list[uuid.UUID]) -> int:
    """Place an order by `get_or_create`, with items by `bulk_create`."""
    order, made = Order.objects.get_or_create(id=uuid.uuid4(), defaults={"customer": "bob"})
    Item.objects.bulk_create([Item(order=order, line=line, sku=f"sku {line}", price=Decimal("1.10")) for line in (1, 2, 3)])
    known[:] = [*known[-50:], order.id]
    return int(made)


def update(known: list[uuid.UUID]) -> int:
    """Raise a price, which is locked and read first."""
    item = Item.objects.select_for_update().filter(order_id=some(known)).first()
    if item is None:
        return 0
    return Item.objects.filter(order_id=item.order_id, line=item.line).update(price=item.price + 1)


def delete(known: list[uuid.UUID]) -> int:
    """Take an order back, and its items."""
    taken = some(known)
    Item.objects.filter(order_id=taken).delete()
    return Order.objects.filter(id=taken).delete()[0]


def some(known: list[uuid.UUID]) -> uuid.UUID:
    """Return an order that was made lately."""
    return random.choice(known) if known else uuid.uuid4()


def serve(router: Router, known: list[uuid.UUID]) -> tuple[str, int]:
    """Serve one request; return what it did, and to how many orders."""
    kind, work = random.choice([("inserted", insert), ("updated", update), ("deleted", delete)])

    def atomic(place: Place) -> int:
        token = PLACE.set(place.origin.value)
        try:
            with transaction.atomic(using=place.origin.value):
                return work(known)
        finally:
            PLACE.reset(token)

    return kind, router.rerun(atomic)


def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done, known = threading.Event(), Counter[str](), list[uuid.UUID]()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Router.connect(load("changeover.toml")) as router:
        while not ended.wait(0.03):
            try:
                kind, count = serve(router, known)
            except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
                kind, count = f"failed: {error}", 1
            done[kind] += count
    print(json.dumps(done))


if __name__ == "__main__":
    main()
