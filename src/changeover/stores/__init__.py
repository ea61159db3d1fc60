"""The stores that a table can move to.

`base` has the interface and what all stores share. `postgres` and `delta` implement it. `tables` reads what a PostgreSQL table
has by itself.
"""
