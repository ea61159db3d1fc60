"""The wire: what a PostgreSQL server sends becomes the spool's events.

Nothing here has a connection. Rows are read column by column over thousands of messages.
"""
