"""Tools of a module whose annotations are texts until someone asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from llm_orm import Tool, ToolContext, tool

if TYPE_CHECKING:
    from decimal import Decimal


class Place(BaseModel):
    city: str
    country: str = "GB"


@tool
def travel(
    place: Place, by: Annotated[Literal["train", "ship"], Field(description="How")], context: ToolContext | None = None
) -> str:
    """Go there."""
    return f"{place.city}, {place.country} by {by} in {context.tool_call_id if context else None}"


class Pay(Tool):
    """Pay a bill."""

    class Parameters(BaseModel):
        amount: int

    def execute(self, amount: Decimal, context: ToolContext) -> str:
        return f"{amount} in {context.tool_call_id}"


def unknown(amount: Decimal) -> str:
    """Its annotation names what is not there."""
    return str(amount)
