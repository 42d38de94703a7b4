"""A model folder becomes an engine, and an engine a function from prompts to outputs."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from leanseek import checkpoint
from leanseek.backends import open_backend
from leanseek.engine.engine import Engine
from leanseek.engine.outputs import CompletionOutput, Delta, RequestOutput, Timing, Usage
from leanseek.engine.params import EngineError, SamplingParams
from leanseek.engine.sequence import Request
from leanseek.engine.tokenizer import Tokenizer
from leanseek.errors import RunError
from leanseek.machine.device import default_device
from leanseek.reading import Structure, TokenId, checked, read_optional_json

# Keys of generation_config.json that are defaults of a request, and what they are called here.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# Keys that change what transformers samples and are not served, with the value that changes nothing beside None.
_UNSERVED: dict[str, Any] = {
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": [],
    "watermarking_config": None,
    "dola_layers": None,
}

log = logging.getLogger(__name__)


class _Generation(Structure):
    """What is read of a generation_config.json; SamplingParams bounds the numbers."""

    eos_token_id: TokenId | list[TokenId] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def load_engine(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    int8_head: bool = False,
    packed_copy: bool = True,
    allow_links: bool = False,
    **options: Any,
) -> Engine:
    """An engine over a Hugging Face folder or a run.

    device: the GPU if there is one, when None. dtype: with "auto" weights stay as they are stored, FP8 included.
    int8_head: the output head in 8 bits with a scale a row, whatever it is stored in.
    packed_copy: on a CPU, weights in the kernels' order are kept in a file beside the model, which the next start maps.
    allow_links: read what links out of the folder lead to; else they are refused.

    Raises:
        InputError: the folder, or an option of the engine, is not right.
    """
    Engine.check_process()  # before anything runs on threads
    folder = checkpoint.resolve(path, allow_links)
    try:
        device = torch.empty(0, device=device or default_device()).device
    except (RuntimeError, AssertionError) as error:  # before the weights are read
        raise EngineError(f"device = {device!r}: {str(error).splitlines()[0]}") from None
    backend, copying = open_backend(
        folder, device, dtype, int8_head=int8_head, packed_copy=packed_copy, allow_links=allow_links
    )
    found = checkpoint.find_tokenizer(folder, allow_links)
    config = folder / "generation_config.json"
    generation = read_optional_json(config, EngineError)
    eos = checked(_Generation, generation, str(config), EngineError).eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    engine = Engine(
        backend,
        Tokenizer(found) if found else None,
        defaults=_defaults(config, generation),
        eos_token_ids=sorted({*eos, *backend.config.eos_token_ids}),
        **options,
    )
    engine.copying = copying
    return engine


def _defaults(file: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """A model's own SamplingParams, as transformers reads them; tells of those that are not served.

    Raises:
        EngineError: a value out of its range.
    """
    defaults = {ours: generation[key] for key, ours in _DEFAULTS.items() if generation.get(key) is not None}
    if generation.get("do_sample") is False:  # then the likeliest token, whatever temperature stands beside it
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except EngineError as error:
        raise EngineError(f"{file}: {error}") from None
    unserved = [key for key, none in _UNSERVED.items() if generation.get(key) not in (None, none)]
    if unserved:
        log.warning("%s: %s will not be applied; leanseek does not serve it", file, ", ".join(unserved))
    return defaults


class LLM:
    """As vLLM's: `LLM(path).generate(prompts, SamplingParams(...))`.

    Any number of threads may call it. One of them works the engine for all, so their requests run together.

    path: a Hugging Face folder, a run, or an Engine made already. options: those of `load_engine` and `Engine`.

    Raises:
        InputError: the folder, or an option of the engine, is not right.
    """

    def __init__(self, path: str | Path | Engine, **options: Any):
        # nobody comes while a prompt is read: steps may last
        self.engine = path if isinstance(path, Engine) else load_engine(path, **{"step_seconds": 60.0} | options)
        self._numbers = itertools.count(1)
        self._lock = threading.Condition()  # of what follows; nobody holds it for longer than that takes
        self._working = False  # whether a thread works the engine
        self._commands: list[Request | str] = []  # a request to add, or the id of one to abort
        self._inboxes: dict[str, deque[Delta]] = {}  # deltas nobody has taken yet, of requests that somebody reads

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Outputs of all prompts, in their order. Without params: the model's defaults.

        Raises:
            EngineError: a prompt that cannot be served; nothing has run then.
            RunError: a request failed.
        """
        listed: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(params, SamplingParams | None):
            params = [params or SamplingParams(**self.engine.defaults)] * len(listed)
        if len(params) != len(listed):
            raise EngineError(f"{len(listed)} prompts came with {len(params)} SamplingParams")
        requests = [self._request(prompt, p) for prompt, p in zip(listed, params, strict=True)]
        outputs = {
            request.request_id: _empty_output(request, prompt if isinstance(prompt, str) else None)
            for request, prompt in zip(requests, listed, strict=True)
        }
        for delta in self._run(requests):
            _extend(outputs[delta.request_id], delta)
        return list(outputs.values())

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """The deltas of one prompt as they come; closing the iterator ends the request.

        Raises:
            EngineError: the prompt cannot be served.
            RunError: the request failed.
        """
        yield from self._run([self._request(prompt, params or SamplingParams(**self.engine.defaults))])

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise EngineError("a text prompt needs a tokenizer.json beside the model; give token ids instead")
            prompt = self.tokenizer.encode(prompt, most=self.engine.max_model_len)
        self.engine.check(prompt, params)
        number = next(self._numbers)
        return Request(f"request-{number}", list(prompt), params, matcher=self.engine.matcher(params))

    def _run(self, requests: Sequence[Request]) -> Generator[Delta, None, None]:
        """Deltas of the requests until they have ended."""
        own = {request.request_id: request.params.n for request in requests}  # choices that have not ended
        inbox: deque[Delta] = deque()
        with self._lock:
            self._commands += requests
            self._inboxes |= dict.fromkeys(own, inbox)
        try:
            while own:
                if not inbox:
                    self._await(inbox)
                    continue
                delta = inbox.popleft()
                if delta.error is not None:
                    raise (EngineError if delta.refused else RunError)(f"{delta.request_id} failed: {delta.error}")
                if delta.finish_reason is not None:
                    own[delta.request_id] -= 1
                    if not own[delta.request_id]:
                        del own[delta.request_id]
                yield delta
        finally:
            self._leave([request.request_id for request in requests], list(own))

    def _await(self, inbox: deque[Delta]) -> None:
        """Return when there may be something in the inbox: a step later, by this thread or another."""
        with self._lock:
            while self._working and not inbox:
                self._lock.wait()
            if inbox:
                return
            self._working = True
        self._work(step=True)

    def _leave(self, readers: list[str], unfinished: list[str]) -> None:
        """Read no more of these requests; those that have not ended do so now, or before the next step."""
        with self._lock:  # which may be entered again: the garbage collector closes iterators anywhere
            for request_id in readers:
                del self._inboxes[request_id]
            self._commands += unfinished
            if self._working or not self._commands:
                return
            self._working = True
        self._work(step=False)

    def _work(self, step: bool) -> None:
        """As the one thread that set `_working`: do what was asked for since the last step, run one, share it out."""
        deltas: list[Delta] = []
        try:
            with self._lock:
                commands, self._commands = self._commands, []
            for command in commands:
                if isinstance(command, str):
                    self.engine.abort(command)
                    continue
                try:
                    self.engine.add(command)
                except EngineError as error:  # it may be another thread's
                    deltas.append(Delta(command.request_id, finish_reason="error", error=str(error), refused=True))
            if step:
                deltas += self.engine.step()
        finally:
            with self._lock:
                for delta in deltas:
                    if (inbox := self._inboxes.get(delta.request_id)) is not None:
                        inbox.append(delta)
                self._working = False
                self._lock.notify_all()


def _empty_output(request: Request, prompt: str | None) -> RequestOutput:
    nothing = Usage(len(request.prompt_token_ids), 0, 0, 0, 0)
    outputs = [CompletionOutput(i, "", [], None, None, None, nothing, Timing(0.0)) for i in range(request.params.n)]
    return RequestOutput(request.request_id, prompt, request.prompt_token_ids, outputs, None)


def _extend(output: RequestOutput, delta: Delta) -> None:
    choice = output.outputs[delta.index]
    choice.text += delta.text
    choice.token_ids += delta.token_ids
    choice.sampled_logprobs += delta.sampled_logprobs
    if delta.logprobs is not None:
        choice.logprobs = (choice.logprobs or []) + delta.logprobs
    output.prompt_logprobs = delta.prompt_logprobs or output.prompt_logprobs
    if delta.usage and delta.timing:
        choice.usage, choice.timing = delta.usage, delta.timing
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
