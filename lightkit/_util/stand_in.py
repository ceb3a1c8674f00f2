"""Replaces a method of one object by an attribute that copies of the object do not have."""

from __future__ import annotations

from typing import Any


class StandIn:
    """An attribute of an object in place of a method of its class, until `undo`.

    The object keeps its class. Copies and pickles are made without the attribute, by a ``__getstate__`` of the object's
    own, unless its class has another way to make them.

    Args:
        owner: the object.
        name: of the method.
        value: the callable that replaces the method.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        # Not by `setattr`: that of nn.Module takes its time.
        vars(owner)[name] = value
        vars(owner)["__getstate__"] = self._state

    def undo(self) -> None:
        """Removes the attribute, unless somebody has replaced it."""
        own = vars(self._owner)
        if own.get(self._name) is self._value:
            del own[self._name]
        if getattr(own.get("__getstate__"), "__self__", None) is self:
            del own["__getstate__"]

    def _state(self) -> Any:
        owner, cls = self._owner, type(self._owner)
        # Objects have the method from Python 3.11 on.
        get_state = getattr(cls, "__getstate__", None)
        state = vars(owner) if get_state is None else get_state(owner)
        if not isinstance(state, dict):
            return state
        left_out = (self._name, "__getstate__")
        return {name: value for name, value in state.items() if name not in left_out}
