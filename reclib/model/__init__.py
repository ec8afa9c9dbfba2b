"""The model, and the adapters that wrap it."""
