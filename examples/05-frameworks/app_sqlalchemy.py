"""An application on SQLAlchemy's ORM: an engine for each store, and a session for each unit of work, until SIGTERM."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import uuid
from collections import Counter
from decimal import Decimal
from typing import Any

import psycopg
from ldclient.migrations.types import Origin
from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from changeover.api import Place, Router, load
from changeover.errors import ChangeoverError


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """An order with its items."""

    __tablename__ = "orders"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]
    items: Mapped[list[Item]] = relationship(cascade="all, delete-orphan")


class Item(Base):
    """A line of an order."""

    __tablename__ = "items"
    order_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    price: Mapped[Decimal]


ENGINES = {
    origin: create_engine("postgresql+psycopg://", creator=lambda name=name: psycopg.connect(os.environ[name]))
    for origin, name in ((Origin.OLD, "OLD_DSN"), (Origin.NEW, "NEW_DSN"))
}
COUNT = "SELECT count(*), coalesce(sum(price), 0) FROM items WHERE order_id = %s"


class Application:
    """What it keeps in memory: the orders that it made last."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.known: list[uuid.UUID] = []

    def insert(self, place: Place) -> int:
        """Place an order with two items."""
        with Session(ENGINES[place.origin]) as session, session.begin():
            items = [Item(line=line, sku=f"sku {line}", price=Decimal("2.50") * line) for line in (1, 2)]
            order = Order(id=uuid.uuid4(), customer="ann", items=items)
            session.add(order)
            made = order.id
        self.known = [*self.known[-50:], made]
        return 1

    def update(self, place: Place) -> int:
        """Raise a price, which is locked and read first."""
        with Session(ENGINES[place.origin]) as session, session.begin():
            item = session.scalars(select(Item).where(Item.order_id == self.some()).with_for_update().limit(1)).first()
            if item is not None:
                item.price += 1
            return int(item is not None)

    def delete(self, place: Place) -> int:
        """Take an order back, and its items."""
        with Session(ENGINES[place.origin]) as session, session.begin():
            order = session.get(Order, self.some())
            if order is not None:
                session.delete(order)
            return int(order is not None)

    def some(self) -> uuid.UUID:
        """Return an order that was made lately."""
        return random.choice(self.known) if self.known else uuid.uuid4()

    def serve(self) -> tuple[str, int]:
        """Serve one request; return what it did, and to how many orders."""
        match random.choice(["inserted", "updated", "deleted", "read", "read"]):
            case "inserted":
                return "inserted", self.router.rerun(self.insert)
            case "updated":
                return "updated", self.router.rerun(self.update)
            case "deleted":
                return "deleted", self.router.rerun(self.delete)
        asked = [self.some()]

        def read(cursor: Any) -> Any:
            return cursor.execute(COUNT, asked).fetchone()

        self.router.compare(old=read, new=read)
        return "read", 1


def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done = threading.Event(), Counter[str]()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Router.connect(load("changeover.toml")) as router:
        application = Application(router)
        while not ended.wait(0.02):
            try:
                kind, count = application.serve()
            except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
                kind, count = f"failed: {error}", 1
            done[kind] += count
    print(json.dumps(done))


if __name__ == "__main__":
    main()
