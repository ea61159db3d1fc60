"""Capture: the one long-lived service, which brings a store's changes into the spool in commit order.

A slot or a trigger log is read. The server forgets only what the spool holds durably.
"""
