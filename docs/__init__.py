"""The documentation site: its pages, what generates the others, and what checks the result."""
