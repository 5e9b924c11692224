"""What a decode step must cost: bytes and operations, and the time of a given machine.

For tuning, speed and the page; imports models and the core.
"""
