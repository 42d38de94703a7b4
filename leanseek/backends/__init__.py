"""What runs a step for the engine: a model becomes a step backend here, and the engine sees nothing else of it."""

from leanseek.backends.eager import TorchBackend
from leanseek.backends.opening import backend_of, open_backend
from leanseek.backends.panels import PanelBackend, refusal
from leanseek.backends.protocol import StepBackend

__all__ = ["PanelBackend", "StepBackend", "TorchBackend", "backend_of", "open_backend", "refusal"]
