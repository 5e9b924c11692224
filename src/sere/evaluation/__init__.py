"""What a policy, or a rival of other papers, costs in quality: decoded in one pass, against stock.

For tuning and engine runs; imports calibration, models, results and the core.
"""
