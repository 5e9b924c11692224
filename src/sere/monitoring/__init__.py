"""A running server, seen from outside: what its metrics say, live in a terminal.

For the command line; imports nothing of ours.
"""
