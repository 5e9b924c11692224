"""A running server, seen from outside: what its metrics say, live in a terminal, and its switch.

For the command line; imports nothing of ours.
"""
