"""The commands of the flag: show, advance, roll back, and follow a stage that was set elsewhere.

The flag's file is switched and authority moves with it, or neither happens.
"""
