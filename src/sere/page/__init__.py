"""`sere report`: a folder of results as one page that needs no network.

`sources` says what each file is, by its content; one module for each kind of result says what is
shown of it; `render` puts the parts into page.html. What the page shows is also in it as JSON.
For the command line; imports calibration, step_cost, results and the core.
"""
