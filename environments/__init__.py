"""The catalogue of environments: one module each, made by name with ``agentrl.make("calculator")``."""

__all__ = ()
