"""The runs below a directory, as their files tell: a table, comparisons, a page for each sweep, and removal.

The package imports neither torch nor Hydra, and takes every file for a stranger's.
"""
