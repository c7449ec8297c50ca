"""Data held in memory, embedded sets, and what is done to a batch of pictures."""

from stillhouse.data.digits import corrupted_digits, digits
from stillhouse.data.sets import TensorSet, as_tensor_set, concatenate

__all__ = ["TensorSet", "as_tensor_set", "concatenate", "corrupted_digits", "digits"]
