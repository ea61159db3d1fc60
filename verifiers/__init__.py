"""Verifiers: the proof that two stores hold the same rows at one position.

A wrong row is data in a verdict; a comparison that has no answer is an error, never a verdict of "equal".
"""
