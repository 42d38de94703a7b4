"""Inference: checkpoints -> tokens. Start at engine.py; llm.py and asynchronous.py are its two interfaces."""

from leanseek.engine.asynchronous import AsyncEngine, EngineStopped, QueueFull, RequestFailed, Stream
from leanseek.engine.confined import Child, Confined, Crowded, Overtaxed
from leanseek.engine.engine import Engine
from leanseek.engine.llm import LLM, load_engine
from leanseek.engine.outputs import (
    CompletionOutput,
    Delta,
    EngineStats,
    RequestOutput,
    Timing,
    TokenLogprob,
    Usage,
)
from leanseek.engine.params import EngineError, Guide, SamplingParams
from leanseek.engine.sequence import Request
from leanseek.engine.spans import Spans
from leanseek.engine.tokenizer import Tokenizer, TooLong

__all__ = [
    "LLM",
    "AsyncEngine",
    "Child",
    "CompletionOutput",
    "Confined",
    "Crowded",
    "Delta",
    "Engine",
    "EngineError",
    "EngineStats",
    "EngineStopped",
    "Guide",
    "Overtaxed",
    "QueueFull",
    "Request",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "Spans",
    "Stream",
    "Timing",
    "TokenLogprob",
    "Tokenizer",
    "TooLong",
    "Usage",
    "load_engine",
]
