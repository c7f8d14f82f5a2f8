"""The plan: everything a run needs, and nothing of how it was made."""
