"""Settings that follow the name of some data like those of a web address: `NAME?one=1&two=2`."""

from __future__ import annotations

from dino.files import UserError


def parse(query: str, form: str, what: str) -> dict[str, str]:
    """The settings in `one=1&two=2`.

    Args:
        query: what follows the question mark.
        form: how all settings there are would be written, as in `NAME?one=NUMBER&two=NUMBER`.
        what: is named, such as "a list".

    Raises:
        UserError: for a setting that `form` does not have.
    """
    settings = dict(part.partition("=")[::2] for part in query.split("&") if part)
    unknown = sorted(settings.keys() - known(form))
    if unknown:
        raise UserError(f"{unknown[0]!r} is no setting of {what}: write {form}")
    return settings


def known(form: str) -> set[str]:
    """The names of the settings in a form; see `parse`."""
    return {part.partition("=")[0] for part in form.partition("?")[2].split("&")}


def split(data: str, form: str, what: str) -> tuple[str, dict[str, str]]:
    """`NAME?one=1` as NAME and its settings; see `parse`."""
    name, _, query = data.partition("?")
    return name, parse(query, form, what)
