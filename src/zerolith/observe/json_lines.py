"""Log records as JSON: one object per line, for machines."""

from __future__ import annotations

import json
import logging
import math
from datetime import datetime, timezone


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger and message, then what the record has as `numbers`.

    JSON has no NaN and no infinity: a number that is not finite becomes null.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        fields: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "numbers", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: _finite(value) for name, value in fields.items()}, allow_nan=False, default=str)


def _finite(value: object) -> object:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
