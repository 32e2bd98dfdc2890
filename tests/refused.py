"""What refusals are asked about, not their wording: the field of a request at fault, or what the system answered."""

from __future__ import annotations

from collections.abc import Callable

from latentrt.engines.errors import LatentrtError, RequestError


def about(field: str | None) -> Callable[[RequestError], bool]:
    """Return the check for `pytest.raises` that an error is one sentence about a field of the request."""

    def check(error: RequestError) -> bool:
        assert error.field == field, f"{error} is about {error.field}, expected {field}"
        return "\n" not in str(error)

    return check


def caused_by(code: int) -> Callable[[LatentrtError], bool]:
    """Return the check for `pytest.raises` that an error was made of what the system answered, such as ENOSPC."""

    def check(error: LatentrtError) -> bool:
        return isinstance(error.__cause__, OSError) and error.__cause__.errno == code

    return check
