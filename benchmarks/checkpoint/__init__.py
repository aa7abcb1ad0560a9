"""Saves and loads of one training state, zerolith's beside its peers' and beside plain writing and reading."""
