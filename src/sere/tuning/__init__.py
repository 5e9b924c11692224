"""The fastest policy within a user's budget of quality, checked on text it has not seen.

For the command line; imports evaluation, step_cost, results and the core.
"""
