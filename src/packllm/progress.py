"""Progress bars for those who wait: none for what is done within two seconds, none where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SLOW = 2.0
"""Seconds of work before its bar appears."""


@contextmanager
def bars_if_slow() -> Iterator[None]:
    """The bars of transformers within appear where they pay only; a hook that someone else has set stays."""
    from transformers.utils import logging

    def patient(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        options = {**options, "delay": SLOW, "disable": options.get("disable") or None}
        return make(*args, **options) if before is None else before(make, args, options)

    before = logging.set_tqdm_hook(patient)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
