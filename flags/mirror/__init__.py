"""The application's own mirror: what a unit of work changed, offered to the other store.

A unit says what it wrote, and is refused where it did not say all of it. Workers bring it over in batches.
"""
