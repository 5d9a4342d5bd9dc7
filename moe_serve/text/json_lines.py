"""One line of a file of JSON objects, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any


def read_line(line: bytes) -> dict[str, Any] | str:
    """Return the object in a line, or what is wrong with it, without the place in the file."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        return f"not JSON: not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; [[[[...
        return f"not JSON: {error}"
    return entry if isinstance(entry, dict) else "not a JSON object"
