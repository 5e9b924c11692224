"""Long texts and public tasks in a real engine, under stock routing and under policies.

For the command line; imports evaluation, models, serving, results and the core.
"""
