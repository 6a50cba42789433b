"""What the loss modules share: options are attributes, and show in ``repr``."""

from __future__ import annotations

from typing import Any

from torch import nn


class LossModule(nn.Module):
    """Keeps the keyword options of a loss function as plain attributes, so that a schedule can change them in place."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        """The options as they stand now, ready to be passed on to the function."""
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())
