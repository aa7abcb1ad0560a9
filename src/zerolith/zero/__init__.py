"""Access to sharded parameters, and building models that never exist whole."""
