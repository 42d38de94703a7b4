"""Folders on disk: Hugging Face in and out (BF16, FP8 blocks), GGUF out, training checkpoints."""

from leanseek.checkpoint.convert import convert
from leanseek.checkpoint.files import CheckpointError
from leanseek.checkpoint.gguf import export_gguf
from leanseek.checkpoint.hf import load, open_checkpoint, read_config, resolve, save, write_model
from leanseek.checkpoint.names import iter_hf_tensors
from leanseek.checkpoint.tokenizer import find_tokenizer
from leanseek.checkpoint.training import load_ema

__all__ = [
    "CheckpointError",
    "convert",
    "export_gguf",
    "find_tokenizer",
    "iter_hf_tensors",
    "load",
    "load_ema",
    "open_checkpoint",
    "read_config",
    "resolve",
    "save",
    "write_model",
]
