"""The executor: it runs a plan, and knows nothing of mappings."""
