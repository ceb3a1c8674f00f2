"""The body of a request: an object of JSON with named fields, or the content of a file with options in the query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_type_hints

from lightkit._util.printable import printable
from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.serving.messages import Request, RequestError
from lightkit.errors import ConfigError
from lightkit.targets import check_types, nearest

# Content types that clients send when nobody has named one: the content decides.
_UNNAMED = ("", "application/octet-stream", "application/x-www-form-urlencoded")

_HINTS = get_type_hints(PredictionRequest)

# The characters of a value in a message.
_SHOWN = 80


def is_json(request: Request, media_types: Sequence[str]) -> bool:
    """Returns True if the body of a request is JSON, False if it is the content of a file.

    A body whose content type says nothing is JSON if it begins with a brace.

    Args:
        request: the request.
        media_types: the content types of files that the model takes; one that ends in a slash stands for all below it.

    Raises:
        RequestError: the content type is another one, or the body is empty.
    """
    media_type = request.media_type
    if not request.body:
        raise RequestError(400, f"the body is empty, expected {_accepted(media_types)}")
    if media_type == "application/json" or media_type.endswith("+json"):
        return True
    if media_type in _UNNAMED:
        return request.body.lstrip()[:1] == b"{"
    if not any(media_type.startswith(known) if known.endswith("/") else media_type == known for known in media_types):
        raise RequestError(415, f"Content-Type must be {_accepted(media_types)}, got {printable(media_type[:_SHOWN])}")
    return False


def _accepted(media_types: Sequence[str]) -> str:
    return " or ".join(["application/json", *(f"{name}*" if name.endswith("/") else name for name in media_types)])


def read_object(body: bytes) -> dict[str, Any]:
    """Returns the object that a body has as JSON.

    Raises:
        RequestError: the body is no JSON, has a number that JSON does not have, or is no object.
    """
    try:
        content = json.loads(body, parse_constant=_reject_constant)
    except RecursionError as error:
        raise RequestError(400, "the body is no JSON: it is nested too deeply") from error
    except ValueError as error:
        raise RequestError(400, f"the body is no JSON: {printable(str(error))}") from error
    if type(content) is not dict:
        raise RequestError(400, f"the body must be an object of JSON with named fields, got {shown(content)}")
    return content


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def take_options(
    fields: Mapping[str, Any], query: Mapping[str, str] | None, names: Sequence[str], content: Sequence[str] = ()
) -> PredictionRequest:
    """Returns the options of a request, which stand beside the content in JSON or in the query.

    Args:
        fields: the fields of the object; empty for the content of a file.
        query: the parameters of the query. Their values are texts: ``3`` is a number where the option is one.
        names: the options that the model takes, which are fields of a `PredictionRequest`.
        content: the fields of the object that hold the content.

    Raises:
        RequestError: a name is unknown or is given twice.
        ConfigError: a value is of another type than the option.
    """
    given = {name: value for name, value in fields.items() if name not in content}
    for name, text in (query or {}).items():
        if name in given:
            raise RequestError(400, f"{shown(name)} stands both in the body and in the query")
        given[name] = _converted(name, text)
    known = [*(content if fields else ()), *names]
    for name in given:
        if name not in names:
            raise RequestError(
                400, f"{shown(name)} is no field of a request{nearest(name, known)}; expected {', '.join(known)}"
            )
    check_types(given, _HINTS)
    for name, value in given.items():
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{name} must be a single value, got {shown(value)}")
    return PredictionRequest(**given)


def _converted(name: str, text: str) -> Any:
    """Returns the value of a parameter of the query: a number or truth value unless the option is a text."""
    if name not in _HINTS or _HINTS[name] == (str | None):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def one_of(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns which of several fields of the content an object has.

    Raises:
        RequestError: it has none of them, or several.
    """
    found = [name for name in names if name in fields]
    if len(found) != 1:
        wanted = " or ".join(names)
        raise RequestError(400, f"the body must have the field {wanted}, got {', '.join(map(shown, fields)) or 'none'}")
    return found[0]


def shown(value: Any) -> str:
    """Returns a value for a message, shortened, without characters that a terminal would obey."""
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)} {'value' if len(value) == 1 else 'values'}"
    text = json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
