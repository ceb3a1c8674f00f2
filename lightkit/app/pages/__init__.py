"""Pages for a browser, each one HTML file that refers to no network: the style, the scripts and the learning curves.

The package imports neither torch nor Hydra, so that a table of runs is written in a moment.
"""
