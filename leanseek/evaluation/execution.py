"""Runs code that a model wrote, in its own process with limits. The limits stop accidents; they are not a sandbox."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY = 2**30  # bytes of address space
FILE_SIZE = 2**20  # bytes of any file it writes
_LIMITS = f"""import resource as _r
for _what, _most in ((_r.RLIMIT_AS, {MEMORY}), (_r.RLIMIT_CPU, {{seconds}}), (_r.RLIMIT_FSIZE, {FILE_SIZE})):
    _r.setrlimit(_what, (_most, _most))
_r.setrlimit(_r.RLIMIT_CORE, (0, 0))
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {{{{"__name__": "program"}}}})
"""


def passes(program: str, seconds: float | None = None) -> bool:
    """Whether a Python program runs to its end, in an empty folder, without environment and within limits.

    seconds: of CPU time, SECONDS if None; it may wait for as long again
    """
    seconds = SECONDS if seconds is None else seconds
    limits = _LIMITS.format(seconds=math.ceil(seconds))
    word = secrets.token_hex(16)  # printed after the last line, so that an early exit does not pass
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "limits.py").write_text(f"{limits}print({word!r})\n", encoding="utf-8")
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        said = Path(folder, "said")
        with said.open("wb") as out:  # a file: the limit on its size ends what writes without end
            process = subprocess.Popen(
                [sys.executable, "-I", "limits.py"],
                cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2 * seconds)  # sleeping takes no CPU time
        finally:
            with contextlib.suppress(ProcessLookupError):  # and whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == 0 and said.read_bytes().rstrip().endswith(word.encode())
