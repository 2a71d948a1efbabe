"""What ties layouts to other libraries, a module for each.

Import a module by its full name, `sparse_layouts.integrations.transformers`: it needs that library,
and importing `sparse_layouts` imports none of them.
"""
