"""Everything llm_orm raises of its own.

    LlmOrmError
    ├── TryAgain              the same call may succeed later
    │   ├── ChatBusy              another turn of this chat is running
    │   └── DatabaseUnavailable   the database did not answer, or its pool is exhausted
    ├── WrongCall             the call must be changed
    │   ├── EmptyMessage, UnknownKeyword, InvalidValue, NoModel, UnknownModel
    │   ├── AsyncTool             an async tool in a synchronous ask
    │   ├── InsideTransaction     a turn was started inside the caller's own transaction
    │   ├── NothingToRetry, NothingToResume
    │   ├── AwaitsApproval        the chat's turn waits for approve() or deny()
    │   ├── InvalidFile           a file that is missing, too large, or of a type that cannot be sent
    │   └── AgentMismatch         a session was created for another class of agent
    ├── WrongSetup            the installation must be changed
    │   ├── InvalidDatabase       what connect() was given names no database we can use
    │   ├── TablesMissing         a table or column is not there: run "llm-orm migrate"
    │   ├── WrongKey              stored content is encrypted, and not with a key that connect() was given
    │   └── StoreClosed
    └── TurnFailed            the turn is over, and asking again costs money
        ├── ToolRoundsExceeded
        ├── ToolError             raised by a tool; fatal=True ends the turn
        ├── TurnCancelled         chat.cancel() was called
        ├── InvalidReply          the reply does not match the schema; its text is in .text
        ├── UnreadableReply       what the model's library gave back cannot be read; what it cost is on record
        ├── CorrectionsExceeded   middlewares kept sending the model back
        ├── StoppedByMiddleware
        ├── CostLimitExceeded     a CostGuard stopped the turn before the call that would exceed its limit
        ├── BudgetExceeded        a Budget is spent, until it resets; it says when
        ├── ReplyNotSaved         a paid reply could not be written; it is in .reply
        └── ChatGone              the chat was deleted

A provider's exception is none of these: it reaches the caller as litellm raised it.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class LlmOrmError(Exception):
    """Something went wrong in llm_orm"""

    def __init__(self, message: str | None = None):
        super().__init__(message or self.__doc__ or type(self).__name__)


class TryAgain(LlmOrmError):
    """The same call may succeed later"""


class ChatBusy(TryAgain):
    """Another turn of this chat is running"""


class DatabaseUnavailable(TryAgain):
    """The database did not answer"""

    nothing_was_sent: bool = False
    """Whether this is certain: no connection could be had."""

    may_pass: bool = False
    """Whether it is likely to pass: a lost connection, a deadlock, a server that is starting."""


class WrongCall(LlmOrmError):
    """The call must be changed before it can succeed"""


class EmptyMessage(WrongCall, ValueError):
    """A message needs some text"""


class UnknownKeyword(WrongCall, TypeError):
    """A keyword that is neither an option nor a column"""


class InvalidValue(WrongCall, ValueError):
    """A value of the wrong kind"""


class NoModel(WrongCall, ValueError):
    """The chat names no model: give create_chat(…, model="gpt-4o") or ask(…, model=…)"""


class UnknownModel(WrongCall, ValueError):
    """No provider is known for the model"""


class AsyncTool(WrongCall, TypeError):
    """An async tool can only run in aask() and aask_stream()"""


class InsideTransaction(WrongCall):
    """A turn cannot start inside a transaction of yours: its rows must outlive a rollback"""


class NothingToRetry(WrongCall):
    """The chat has no unanswered user message"""


class NothingToResume(WrongCall):
    """The chat has no turn to go on with"""


class AwaitsApproval(WrongCall):
    """The chat's turn waits for tool calls to be approved or denied

    calls    the tool calls without an answer, as `LlmToolCall` rows
    """

    def __init__(self, message: str | None = None, *, calls: Any = ()):
        super().__init__(message)
        self.calls = list(calls)


class InvalidFile(WrongCall, ValueError):
    """A file that cannot be sent"""


class AgentMismatch(WrongCall, ValueError):
    """The session was created for another class of agent"""


class WrongSetup(LlmOrmError):
    """The installation must be changed"""


class InvalidDatabase(WrongSetup, ValueError):
    """Not a database that llm_orm can use"""


class TablesMissing(WrongSetup):
    """The database lacks a table or a column of llm_orm: run "llm-orm migrate" (or store.create_tables())"""


class WrongKey(WrongSetup):
    """Stored content cannot be opened with the keys of this store

    table, column    where it is
    row              the id of its row, where that is known
    """

    def __init__(self, message: str | None = None, *, table: Any = None, column: Any = None, row: Any = None):
        super().__init__(message)
        self.table = table
        self.column = column
        self.row = row


class StoreClosed(WrongSetup):
    """The store was closed"""


class TurnFailed(LlmOrmError):
    """The turn is over"""


class ToolRoundsExceeded(TurnFailed):
    """The model kept asking for tools"""


class ToolError(TurnFailed):
    """Raise this in a tool; fatal=True ends the turn, else the model is told and goes on

    >>> raise ToolError("the order is locked", fatal=True)
    """

    def __init__(self, message: str | None = None, *, fatal: bool = False):
        super().__init__(message)
        self.fatal = fatal


class TurnCancelled(TurnFailed):
    """The turn was stopped by chat.cancel()"""


class InvalidReply(TurnFailed, ValueError):
    """The model's reply does not match the schema

    text      the reply, as the model wrote it
    problem   what is wrong with it
    reply     llm_orm.Reply, whole
    """

    def __init__(self, message: str | None = None, *, text: str = "", problem: str = "", reply: Any = None):
        super().__init__(message)
        self.text = text
        self.problem = problem
        self.reply = reply


class UnreadableReply(TurnFailed):
    """What the model's library gave back cannot be read"""


class CorrectionsExceeded(TurnFailed):
    """Middlewares sent the model back too often in one turn"""


class StoppedByMiddleware(TurnFailed):
    """A middleware ended the turn"""


class CostLimitExceeded(TurnFailed):
    """The next call of the model would cost more than its limit allows

    limit, spent, estimate    US dollars, as `Decimal`; estimate is None where the model has no known price
    """

    def __init__(self, message: str | None = None, *, limit: Any = None, spent: Any = None, estimate: Any = None):
        super().__init__(message)
        self.limit = limit
        self.spent = spent
        self.estimate = estimate


class BudgetExceeded(TurnFailed):
    """A budget is spent; the next call of the model was not made

    budget         the `Budget`
    who            whom it is about: {"user_id": "u_1"}; {} where it counts all
    spent, limit   US dollars, as `Decimal`
    resets_at      when the next period begins, an aware time; None: never
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        budget: Any = None,
        who: Any = None,
        spent: Any = None,
        limit: Any = None,
        resets_at: Any = None,
    ):
        super().__init__(message)
        self.budget = budget
        self.who = who
        self.spent = spent
        self.limit = limit
        self.resets_at = resets_at


class ReplyNotSaved(TurnFailed):
    """The model's reply was paid for and could not be written; it is in .reply

    reply    llm_orm.Reply, whole: content, thinking, tool calls, usage, cost
    """

    def __init__(self, message: str | None = None, *, reply: Any = None):
        super().__init__(message)
        self.reply = reply


class ChatGone(TurnFailed):
    """The chat was deleted"""


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is likely to stand for."""
    plain = {each.replace("_", "").lower(): each for each in known}
    name = name.replace("_", "").lower()
    found = difflib.get_close_matches(name, plain, n=1, cutoff=0.85)
    if not found:  # two letters that changed places: the shorter the name, the less is it like what was meant
        found = [each for each in difflib.get_close_matches(name, plain, cutoff=0.75) if sorted(each) == sorted(name)]
    return plain[found[0]] if found else None


def check_spelling(owner: str, declared: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name in a class that is nearly one of ours: it would be passed over without a word."""
    for name in declared:
        if not name.startswith("_") and name not in known and (right := meant(name, known)):
            raise InvalidValue(f"{owner} has {name!r}, which means nothing to llm_orm: write {right!r}, or rename it")
