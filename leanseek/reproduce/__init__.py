"""The paper's claims, reproduced at a scale that two cores carry: `leanseek reproduce`."""

from leanseek.reproduce.claims import Claim, find_claims
from leanseek.reproduce.runner import reproduce

__all__ = ["Claim", "find_claims", "reproduce"]
