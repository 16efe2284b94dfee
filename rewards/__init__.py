"""The catalogue of rewards: one module each, made by name with ``agentrl.make_reward("numeric")``."""

__all__ = ()
