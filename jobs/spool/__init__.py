"""The spool: every captured change of a store, durable, in commit order.

One writer appends. What the spool holds may be forgotten by the server, and nothing else may.
"""
