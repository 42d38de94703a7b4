"""A run on several ranks: applied to model and trainer from outside."""

from leanseek.distributed.launch import join, launch, launched
from leanseek.distributed.mesh import check_layout

__all__ = ["check_layout", "join", "launch", "launched"]
