"""Replaces a method of one object by an attribute that copies of the object do not have."""

from __future__ import annotations

from typing import Any


class StandIn:
    """An instance attribute of an object that replaces a method of the object's class, until `undo`.

    The object keeps its class. It gets a ``__getstate__`` of its own that leaves out the attribute, so that copies and
    pickles call the method of the class again, unless the class copies or pickles its instances by other means.

    Args:
        owner: the object.
        name: the name of the method.
        value: the callable that replaces the method.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        # vars() instead of `setattr`: the ``__setattr__`` of nn.Module is slow.
        vars(owner)[name] = value
        vars(owner)["__getstate__"] = self._state

    def undo(self) -> None:
        """Removes the attribute, unless a program has replaced it by another value."""
        own = vars(self._owner)
        if own.get(self._name) is self._value:
            del own[self._name]
        if getattr(own.get("__getstate__"), "__self__", None) is self:
            del own["__getstate__"]

    def _state(self) -> Any:
        owner, cls = self._owner, type(self._owner)
        # `object` has the method ``__getstate__`` from Python 3.11 on.
        get_state = getattr(cls, "__getstate__", None)
        state = vars(owner) if get_state is None else get_state(owner)
        if not isinstance(state, dict):
            return state
        left_out = (self._name, "__getstate__")
        return {name: value for name, value in state.items() if name not in left_out}
