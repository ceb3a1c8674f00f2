"""The OpenAPI description of ``POST /predict`` for one model."""

from __future__ import annotations

from typing import Any

_ERRORS = {
    400: "A field of the request is wrong.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The content type is none that the model takes.",
    500: "The model has failed.",
    503: "Too many requests wait: try again.",
    504: "There was no answer in time.",
}

_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def predict_operation(description: dict[str, Any]) -> dict[str, Any]:
    """Returns the request body, the parameters and the answers of the route, as OpenAPI has them.

    Args:
        description: the description of the model: see `lightkit.app.serving.responder.describe`.
    """
    options, content = description["options"], description["content"]
    body: dict[str, Any] = {"type": "object", "properties": {**content, **options}, "additionalProperties": False}
    if len(content) == 1:
        body["required"] = list(content)
    else:
        body["oneOf"] = [{"required": [name]} for name in content]
    files = {
        f"{media_type}*" if media_type.endswith("/") else media_type: {"schema": {"type": "string", "format": "binary"}}
        for media_type in description["media_types"]
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body, "example": description["example"]}, **files},
        },
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema["description"],
                "schema": {key: value for key, value in schema.items() if key != "description"},
            }
            for name, schema in {**options, **description["file_options"]}.items()
        ],
        "responses": {
            "200": {
                "description": "The prediction.",
                "content": {"application/json": {"schema": {"type": "object"}, "example": description["answer"]}},
            },
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": _ERROR}}}
                for status, text in _ERRORS.items()
            },
        },
    }
