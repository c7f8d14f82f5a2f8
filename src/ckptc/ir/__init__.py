"""The typed graph between mappings and plans, and its verifier."""
