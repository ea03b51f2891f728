"""What a spec can hold that no rule of the API server refuses and that cannot be rendered all the same."""

from __future__ import annotations


class RenderError(ValueError):
    """One field is the cause; whoever wrote the object can mend it.

    field   its path, such as `spec.caption.inferenceService.scaling.metric`
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
