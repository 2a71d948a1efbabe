"""Errors that a user of the command line can mend."""

from __future__ import annotations

from sparse_layouts.viewing.extras import needed


class CommandError(Exception):
    """Told in one line, without a traceback; the command ends with 1."""


class UsageError(CommandError):
    """The same for arguments that make no sense; the command ends with 2."""


def need_package(package: str) -> None:
    """Raises `CommandError` with the pip command for a package that is not installed."""
    try:
        needed(package, "it")
    except ModuleNotFoundError as error:
        raise CommandError(str(error).removeprefix("it ")) from error
