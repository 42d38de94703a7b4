"""What a person did wrong, and what happened to a run, as opposed to what we did wrong."""


class InputError(ValueError):
    """Bad input: one line that says what is wrong and how to mend it. The CLI exits with 2, the server answers 4xx."""


class RunError(RuntimeError):
    """Work that cannot go on (a full disk, a diverged loss): one line that says where it stands. Exit code 1."""


class Lost(RunError):
    """Another process of the run is gone or hangs: nothing can be agreed with it any more."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and what was done is safe on disk. Exit code 130."""
