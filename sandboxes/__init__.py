"""The catalogue of sandbox backends: one module each, made by name with ``agentrl.registry.make_sandbox``."""

__all__ = ()
