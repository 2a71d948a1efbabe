"""`python -m sparse_layouts`: a module for each command, and `main`."""
