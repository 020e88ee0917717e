"""What a chat asks its model with, and the methods that change it: from the next turn on, for this object alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from .budgets import Budget, check_against, check_budgets
from .checks import check_overrides
from .errors import InvalidValue
from .options import Options
from .store import Store
from .values import Fallbacks


@dataclass(frozen=True)
class Config:
    model: str | None
    provider: str | None
    instructions: str | None
    options: Options

    def with_model(self, model: str | None, provider: str | None = None) -> "Config":
        # Another model may be another provider's.
        return replace(self, model=model, provider=provider)

    def with_overrides(self, overrides: dict[str, Any]) -> "Config":
        """With model, provider and instructions as they are given; a model without a provider may be any provider's."""
        changed = self.with_model(overrides["model"]) if "model" in overrides else self
        return replace(changed, **overrides)

    def with_options(self, **options: Any) -> "Config":
        return replace(self, options=self.options.changed(**options))


Change = Callable[[Config], Config]


class Configurable(ABC):
    """The methods of a chat that say how it asks. None of it is stored; each holds from the next turn on."""

    store: Store
    _changes: tuple[Change, ...] = ()
    _hooks: dict[str, tuple[Callable[..., Any], ...]]

    @abstractmethod
    def _base(self) -> Config: ...

    def _standing_base(self) -> Config:
        return self._base()

    @property
    def config(self) -> Config:
        """What the next turn asks with, unless it says otherwise."""
        return self._changed(self._base())

    @property
    def standing(self) -> Config:
        """The same, as far as it is known without asking a function of the inputs."""
        return self._changed(self._standing_base())

    def _changed(self, config: Config) -> Config:
        for change in self._changes:
            config = change(config)
        return config

    def _change(self, change: Change) -> Self:
        change(self.standing)  # what is wrong with it is said here, not on the next turn
        self._changes = (*self._changes, change)
        return self

    def _set(self, **options: Any) -> Self:
        return self._change(lambda config: config.with_options(**options))

    # The model and what it is told

    def with_model(self, model: str, provider: str | None = None) -> Self:
        """Ask another model; it is its own provider's, unless one is named."""
        check_overrides({"model": model, "provider": provider})
        return self._change(lambda config: config.with_model(model, provider))

    def with_provider(self, provider: str | None) -> Self:
        """Have the model called at this provider, by litellm's name of it."""
        check_overrides({"provider": provider})
        return self._change(lambda config: replace(config, provider=provider))

    def with_instructions(self, text: str | None, replace: bool = False) -> Self:
        """Add to the instructions, on a line of its own; or put it in their place."""
        check_overrides({"instructions": text})

        def change(config: Config) -> Config:
            parts = (text,) if replace else (config.instructions, text)
            return _with_instructions(config, "\n".join(part for part in parts if part) or None)

        return self._change(change)

    def system(self, text: str | None, replace: bool = False) -> Self:
        """`with_instructions`, by its short name."""
        return self.with_instructions(text, replace)

    def with_temperature(self, temperature: float | None) -> Self:
        """As the provider takes it."""
        return self._set(temperature=temperature)

    def with_params(self, params: Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """Add further keywords for litellm's `completion()`, as keywords or as a dict."""
        added = {**(params or {}), **more}
        return self._change(lambda c: c.with_options(params={**c.options.params, **added}))

    def with_headers(self, headers: Mapping[str, str] | None = None, /, **more: str) -> Self:
        """Add HTTP headers, as a dict or as keywords: `with_headers({"x-tenant": "t_1"})`. They are never stored."""
        added = {**(headers or {}), **more}
        return self._change(lambda c: c.with_options(headers={**c.options.headers, **added}))

    def with_thinking(self, effort: str | None = None, budget: int | None = None) -> Self:
        """How much the model is to think: an effort, tokens, or both; what is not given stays as it is."""
        wanted = {name: value for name, value in (("effort", effort), ("budget", budget)) if value is not None}
        if not wanted:
            raise InvalidValue('with_thinking() needs effort="low", "medium" or "high", or budget=tokens')

        def change(config: Config) -> Config:
            known = config.options.thinking or {}
            kept = {} if "type" in known else known  # a provider's own shape takes no words of ours
            return config.with_options(thinking={**kept, **wanted})

        return self._change(change)

    def with_effort(self, effort: str) -> Self:
        """`with_thinking(effort=…)`."""
        return self.with_thinking(effort=effort)

    def with_schema(self, schema: Any, corrections: int | None = None) -> Self:
        """Have each reply be what the schema says, and `reply.parsed` an instance of it; None for plain text again.

        schema         a pydantic model, or a JSON schema
        corrections    how often a reply that does not match is sent back; past it: `InvalidReply`
        """
        more = {} if corrections is None else {"corrections": corrections}
        return self._set(schema=schema, **more)

    def with_fallbacks(self, *models: str, on: Any = None) -> Self:
        """Models that are called, in order, where the one before fails for good.

        on    the errors that another model is asked for: exception classes, or their names; default: every error of a
              provider but those that say the request itself is wrong (400, 413, 422)

        The one that answers stays for the rest of the turn. None of them is called once a piece of a stream was shown.
        Without models: no fallbacks any more.
        """
        if any(isinstance(model, list | tuple) for model in models):
            raise InvalidValue(f"fallbacks must be names, one by one: with_fallbacks(*names), not {models[0]!r}")
        return self._set(fallbacks=Fallbacks(tuple(models), on))

    # Tools and middlewares

    def with_tool(self, tool: Any) -> Self:
        """Add a tool."""
        return self.with_tools(tool)

    def with_tools(self, *tools: Any, replace: bool = False) -> Self:
        """Add tools; or put them in the place of those that are there."""

        def change(config: Config) -> Config:
            kept = () if replace else config.options.toolbox.by_name.values()
            return config.with_options(tools=[*kept, *tools])

        return self._change(change)

    def with_tool_choice(self, choice: str | None) -> Self:
        """ "auto", "none", "required" or the name of a tool; a forced choice holds until tools have run in the turn."""
        return self._set(tool_choice=choice)

    def use(self, *middlewares: Any) -> Self:
        """Put middlewares around its calls, after those that are there."""
        return self._change(lambda c: c.with_options(middlewares=(*c.options.middlewares, *middlewares)))

    def with_budgets(self, *budgets: Budget) -> Self:
        """Add budgets: what may be spent; of this chat, unless they say `by`."""
        check_against(self.store.records.chat, check_budgets(budgets))
        return self._change(lambda c: c.with_options(budgets=(*c.options.budgets, *budgets)))

    # Hooks, called in the order in which they were added; none of them can keep a row from being written

    def before_request(self, function: Callable[[list[dict[str, Any]]], Any]) -> Self:
        """Call `function(messages)` before each call of the model, retries too; a list that it returns is sent instead.

        It gets copies, to change as it likes: what is stored stays as it was said.
        """
        return self._hook("before_request", function)

    def after_response(self, function: Callable[..., Any]) -> Self:
        """Call `function(reply)` after each call of the model, once its request is written.

        Gets an `llm_orm.Reply`; one that it returns is put in its place, in the place of one with `tool_calls` too,
        which are then not run. Raises where the one that it returns has any itself.
        """
        return self._hook("after_response", function)

    def on_new_message(self, function: Callable[..., Any]) -> Self:
        """Call `function(message)` before each call of the model, with the pending row that it will fill."""
        return self._hook("on_new_message", function)

    def on_end_message(self, function: Callable[..., Any]) -> Self:
        """Call `function(message)` once a turn has its reply, with the stored row."""
        return self._hook("on_end_message", function)

    def on_tool_call_start(self, function: Callable[..., Any]) -> Self:
        """Call `function(call)` before each tool call, once its row is written. Gets an `llm_orm.ToolCall`."""
        return self._hook("on_tool_call_start", function)

    def on_tool_call_end(self, function: Callable[..., Any]) -> Self:
        """Call `function(call, outcome)` after each tool call, once its result is written."""
        return self._hook("on_tool_call_end", function)

    def on_tool_result(self, function: Callable[..., Any]) -> Self:
        """Call `function(result)` after that, with the text that the model is shown."""
        return self._hook("on_tool_result", function)

    def on_tool_call_error(self, function: Callable[..., Any]) -> Self:
        """Call `function(call, error)` after a tool call that failed; it may return a directive, as middlewares may."""
        return self._hook("on_tool_call_error", function)

    def _hook(self, name: str, function: Callable[..., Any]) -> Self:
        if not callable(function):
            raise InvalidValue(f"{name}() needs a function, not {function!r}")
        self._hooks = {**self._hooks, name: (*self._hooks.get(name, ()), function)}
        return self


def _with_instructions(config: Config, text: str | None) -> Config:
    return replace(config, instructions=text)
