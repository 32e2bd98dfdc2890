"""Logs as lines of JSON, for machines to search."""

from __future__ import annotations

import json
import logging
import time


class JsonLines(logging.Formatter):
    """Writes a record as one line: time, level, logger, message, and the fields that were logged with it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """Writes a record as a person reads it, with its fields behind the sentence."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        return f"latentrt: {super().format(record)}{f'  {fields}' if fields else ''}"


def set_up(*, as_json: bool) -> None:
    """Have the process log what a service does, on stderr. uvicorn's own lines are left out, up to its errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("latentrt").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
