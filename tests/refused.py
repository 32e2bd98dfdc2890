"""What refused requests are asked about: the field at fault, not the wording."""

from __future__ import annotations

from collections.abc import Callable

from latentrt.engines.errors import RequestError


def about(field: str | None) -> Callable[[RequestError], bool]:
    """Return the check for `pytest.raises` that an error is one sentence about a field of the request."""

    def check(error: RequestError) -> bool:
        assert error.field == field, f"{error} is about {error.field}, expected {field}"
        return "\n" not in str(error)

    return check
