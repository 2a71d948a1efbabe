"""What people look at: pictures of patterns, plots, comparisons of masks, the explorer.

Importing this imports neither matplotlib nor ipywidgets.
"""
