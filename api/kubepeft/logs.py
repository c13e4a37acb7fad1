"""How jobs and operator log: one line a record on standard error, JSON unless a person looks.

Only entry points call `configure`; nothing else sets up logging.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from datetime import UTC, datetime

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message and whatever `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure() -> None:
    """Send records of level INFO and up to standard error; KUBEPEFT_LOG=json|text overrules what the terminal says."""
    handler = logging.StreamHandler(sys.stderr)
    wished = os.environ.get("KUBEPEFT_LOG") or ("text" if sys.stderr.isatty() else "json")
    handler.setFormatter(
        JsonLines() if wished == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("ignore", FutureWarning)  # from one library to another; nothing that a user could mend
    for chatty in ("httpx", "urllib3", "botocore", "boto3", "s3transfer", "matplotlib", "filelock", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it does without
