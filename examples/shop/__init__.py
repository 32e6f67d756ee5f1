"""Orders, stock and confirmations: the example that `make demo` runs and kills."""
