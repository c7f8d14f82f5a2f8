"""Mappings: YAML with positions, checked against the schema, as typed records whose strings are still templates."""
