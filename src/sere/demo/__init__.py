"""`sere demo`: both halves of the claim in one run, from calibration to a picture.

For the command line; imports calibration, tuning, speed, serving, results and the core.
"""
