"""leanseek: a complete, open DeepSeek-V3."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from leanseek.machine.threads import set_openmp

if TYPE_CHECKING:
    from leanseek.checkpoint import load, save
    from leanseek.config import ConfigError, ModelConfig
    from leanseek.engine import LLM, SamplingParams
    from leanseek.errors import InputError
    from leanseek.model import Transformer

if "torch" not in sys.modules:  # afterwards nobody reads it
    set_openmp(os.environ)

# Where each public name lives. Imported on first use: `leanseek --help` should not wait for torch.
_HOMES = {
    "ConfigError": "leanseek.config",
    "InputError": "leanseek.errors",
    "LLM": "leanseek.engine",
    "ModelConfig": "leanseek.config",
    "SamplingParams": "leanseek.engine",
    "Transformer": "leanseek.model",
    "load": "leanseek.checkpoint",
    "save": "leanseek.checkpoint",
}

__all__ = ["LLM", "ConfigError", "InputError", "ModelConfig", "SamplingParams", "Transformer", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'leanseek' has no attribute {name!r}")
