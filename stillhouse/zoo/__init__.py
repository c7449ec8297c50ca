"""Embedded teachers and the grounds on which systems are compared."""

from stillhouse.zoo.cache import cached

__all__ = ["cached"]
