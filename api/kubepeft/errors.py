"""The two ways a stage can fail on purpose, and the exit codes that every part agrees on.

Nothing here imports anything: the operator, the jobs and the CLI all read it.
Anything else that is raised is a defect of kubepeft and keeps its traceback.
"""

EXIT_DONE = 0
EXIT_USER = 65
"""The user must change something (EX_DATAERR of sysexits.h); the Job fails at once."""
EXIT_TRY_AGAIN = 75
"""A passing trouble (EX_TEMPFAIL of sysexits.h); the Job's backoffLimit counts it."""
EXIT_SAVED = 143
"""Stopped by SIGTERM after saving; does not count against the backoffLimit."""


class KubepeftError(Exception):
    """A failure that is told in one message: what, where, what to do.

    `reason` is a CamelCase word for conditions and metrics, e.g. "BadRow".
    """

    exit_code: int

    def __init__(self, reason: str, what: str, *, where: str = "", mend: str = "") -> None:
        self.reason = reason
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.mend}" if self.mend else head


class UserError(KubepeftError):
    """The user must change the manifest, the data or the set-up; trying again cannot help."""

    exit_code = EXIT_USER


class TransientError(KubepeftError):
    """Network or storage trouble that may pass; raised only after the retries are used up."""

    exit_code = EXIT_TRY_AGAIN
