"""Files -> tokenizer -> token shards -> packed batches (section 4.1)."""

from leanseek.data.formats import DataError

__all__ = ["DataError"]
