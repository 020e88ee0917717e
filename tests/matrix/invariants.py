"""What must be true of a chat, whatever happened to its turns: each a promise with a name, checked from the rows and
the ledgers alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from llm_orm import Store

from .scenarios import AFTERWARDS, ANSWER, NEXT, QUESTION, Scenario

Row = dict[str, Any]
DIED = "ProcessDied"


@dataclass(frozen=True)
class Rows:
    """The rows of a chat at one moment, ids as text."""

    messages: list[Row]
    tool_calls: list[Row]
    requests: list[Row]
    attachments: list[Row]

    @staticmethod
    def of(store: Store, chat_id: str) -> "Rows":
        records = store.records
        message, tool_call, request = (_table(each) for each in (records.message, records.tool_call, records.request))
        attachment, mark = _table(records.attachment), store.statements.param
        ordered = f"chat_id = {mark} ORDER BY created_at"
        of_chat = f"SELECT id FROM {message} WHERE chat_id = {mark}"
        with store.connection():
            return Rows(
                _read(store, f"SELECT * FROM {message} WHERE chat_id = {mark} ORDER BY position", chat_id),
                _read(store, f"SELECT * FROM {tool_call} WHERE {ordered}, position", chat_id),
                _read(store, f"SELECT * FROM {request} WHERE {ordered}, round", chat_id),
                _read(store, f"SELECT * FROM {attachment} WHERE message_id IN ({of_chat})", chat_id),
            )

    @property
    def pending(self) -> list[Row]:
        return [message for message in self.messages if message["status"] == "pending"]

    def said(self, text: str) -> list[Row]:
        return [message for message in self.messages if message["role"] == "user" and message["content"] == text]


def _table(record: Any) -> str:
    return f'"{record._meta.table_name}"'


def _read(store: Store, sql: str, chat_id: str) -> list[Row]:
    cursor = store.database.execute_sql(sql, (chat_id,))
    names = [column[0] for column in cursor.description]
    return [{name: _plain(name, value) for name, value in zip(names, row, strict=True)} for row in cursor.fetchall()]


def _plain(name: str, value: Any) -> Any:
    if value is not None and (name == "id" or (name.endswith("_id") and name not in TEXTS)):
        return str(value).replace("-", "")
    if name in ("content_raw", "metadata") and isinstance(value, str):
        return json.loads(value)
    if name == "cost" and value is not None:
        return Decimal(str(value)).quantize(Decimal("0.001"))
    return value


TEXTS = ("model_id", "tool_call_id", "provider_request_id")


@dataclass
class Story:
    """What happened to a turn, from its beginning to after it was gone on with."""

    scenario: Scenario
    rows: Rows
    """As they are now."""
    ledger: list[Row]
    before: Rows | None = None
    """As they were when the process had died."""
    ledger_before: list[Row] = field(default_factory=list)
    is_committed: bool | None = None
    """Whether the claim was, where that is known; None where the question was there before."""
    continuation: str = ""
    """ "resume", "ask", "recover"; "" where nobody has gone on yet."""
    deaths: int = 0
    """How often a process died that may have been calling the model."""
    losses: int = 1
    """How many answered calls may have no row of their own: the one that a process died in, but none of a process that
    lives."""
    handed_over: list[Row] = field(default_factory=list)
    """The replies in the caller's error: {"input_tokens", "output_tokens", "cost", "text", "tools"}."""
    unwritten: int = 0
    """How many failed calls the error says are not on record."""
    findings: list[str] = field(default_factory=list)
    """What `llm_orm.soundness` says of the chat."""
    resumed: list[Row] = field(default_factory=list)
    """What `resume()` gave back: {"status", "content"}."""

    def did(self, who: str, did: str) -> list[Row]:
        return [entry for entry in self.ledger if (entry["who"], entry["did"]) == (who, did)]

    def did_before(self, who: str, did: str) -> list[Row]:
        return [entry for entry in self.ledger_before if (entry["who"], entry["did"]) == (who, did)]


Check = Callable[[Story], Iterator[str]]
PROMISES: dict[str, Check] = {}


def promise(name: str) -> Callable[[Check], Check]:
    def keep(check: Check) -> Check:
        PROMISES[name] = check
        return check

    return keep


def violations(story: Story, *names: str) -> list[dict[str, str]]:
    """What is wrong, as {"promise", "detail"}; by all of the promises, or those that are named."""
    found = []
    for name, check in PROMISES.items():
        if names and name not in names:
            continue
        try:
            found += [{"promise": name, "detail": detail} for detail in check(story)]
        except Exception as error:  # rows that a check cannot even read
            found.append({"promise": name, "detail": f"{type(error).__name__}: {error}"})
    return found


# The rows among themselves


@promise("positions are dense")
def positions_are_dense(story: Story) -> Iterator[str]:
    positions = [message["position"] for message in story.rows.messages]
    if positions != list(range(len(positions))):
        yield f"positions are {positions}"


@promise("at most one turn is pending")
def at_most_one_pending(story: Story) -> Iterator[str]:
    if len(story.rows.pending) > 1:
        yield f"{len(story.rows.pending)} messages are pending"


@promise("no tool call outlives its turn")
def no_open_call_of_a_settled_turn(story: Story) -> Iterator[str]:
    pending = {message["id"] for message in story.rows.pending}
    for call in story.rows.tool_calls:
        if call["status"] in ("pending", "running") and call["message_id"] not in pending:
            yield f"{call['tool_call_id']} ({call['name']}) is {call['status']}, and its turn has ended"


@promise("no answer is empty")
def no_answer_is_empty(story: Story) -> Iterator[str]:
    for message in story.rows.messages:
        says = message["content"] or (message["content_raw"] or {}).get("rounds")
        if message["role"] == "assistant" and message["status"] == "completed" and not says:
            yield f"the answer at position {message['position']} is completed and says nothing"


@promise("tokens add up")
def tokens_add_up(story: Story) -> Iterator[str]:
    for message in story.rows.messages:
        if message["role"] != "assistant" or message["status"] in ("pending", "incomplete"):
            continue  # what a call that was given up did cost may be known once its turn has ended
        requests = [request for request in story.rows.requests if request["message_id"] == message["id"]]
        for name in ("input_tokens", "output_tokens"):
            total = sum(request[name] for request in requests)
            if (message[name] or 0) != total:
                where = f"the {message['status']} answer at position {message['position']}"
                yield f"{where} has {message[name]} {name}, its requests {total}"


@promise("every tool call of an answer has its result")
def results_are_complete(story: Story) -> Iterator[str]:
    for message in story.rows.messages:
        if message["status"] != "completed":
            continue
        results = {
            call["tool_call_id"]
            for call in story.rows.tool_calls
            if call["message_id"] == message["id"] and call["result"] is not None
        }
        for said in (message["content_raw"] or {}).get("rounds") or []:
            for call in said.get("tool_calls") or []:
                if call["id"] not in results:
                    yield f"{call['id']} has no result"


@promise("files are whole")
def files_are_whole(story: Story) -> Iterator[str]:
    for message in story.rows.messages:
        kept = [file for file in story.rows.attachments if file["message_id"] == message["id"]]
        said = (message["content_raw"] or {}).get("attachments") or 0
        if len(kept) != said:
            yield f"the message at position {message['position']} has {len(kept)} files and says {said}"


@promise("the database is sound")
def the_database_is_sound(story: Story) -> Iterator[str]:
    """By the words of `llm-orm check`."""
    yield from story.findings


# P1: the question


@promise("the question is there once, or was never said")
def the_question_is_there_once(story: Story) -> Iterator[str]:
    times = len(story.rows.said(QUESTION))
    if times > 1:
        yield f"it is there {times} times"
    is_known = story.is_committed is not None and not (story.scenario.key and story.continuation)
    if is_known and times != story.is_committed:
        yield f"the claim was{'' if story.is_committed else ' not'} committed, and the question is there {times} times"


# P3: money


@promise("every call that was answered is on record, once, with what it cost")
def every_answered_call_is_on_record(story: Story) -> Iterator[str]:
    rows = Counter((row["input_tokens"], row["cost"]) for row in story.rows.requests if row["error"] != DIED)
    asked = {entry["call"] for entry in story.did("provider", "asked")}
    lost = []
    for entry in story.did("provider", "answered"):
        times = rows[entry["input_tokens"], Decimal(entry["cost"])]
        if times > 1:
            yield f"call {entry['call']} ({entry['label']}) has {times} rows"
        elif not times and not _is_handed_over(entry, story):
            lost.append(entry)
    # Where we hung up, what came in that moment is not read any more: the row says what was counted here.
    hung_up = sum(1 for row in story.rows.requests if row["status_code"] == 499 and row["usage_estimated"])
    ended = len(story.did("provider", "answered")) + len(story.did("provider", "failed"))
    excused = max(hung_up - (len(asked) - ended), 0)
    if len(lost) > story.losses + excused:
        yield f"calls {[(entry['call'], entry['label']) for entry in lost]} were answered and have no row"
    if len(rows) and rows.total() > len(asked):
        yield f"{rows.total()} rows for {len(asked)} calls"


def _is_handed_over(entry: Row, story: Story) -> bool:
    """Whether the caller's error has the reply, whole."""
    whole = {name: entry[name] for name in ("input_tokens", "output_tokens", "text", "tools")}
    return {**whole, "cost": Decimal(entry["cost"])} in story.handed_over


@promise("every call that was made is on record")
def every_call_is_on_record(story: Story) -> Iterator[str]:
    if not story.continuation:
        return  # whoever goes on writes that a process died
    asked = len(story.did("provider", "asked"))
    died = sum(1 for row in story.rows.requests if row["error"] == DIED)
    known = len(story.rows.requests) - died
    excused = len(story.handed_over) + story.unwritten
    if known + died < asked - excused:
        yield f"{asked} calls were made, {known} are on record, and {died} as of a process that died"
    if known + died > asked + story.deaths or died > story.deaths:
        yield f"{asked} calls were made, and there are {known} rows, and {died} of a process that died"


@promise("a call of a dead process says that its cost is not known")
def what_died_is_unknown(story: Story) -> Iterator[str]:
    for row in story.rows.requests:
        if row["error"] == DIED and (row["status_code"], row["cost"]) != (0, None):
            yield f"status {row['status_code']}, cost {row['cost']}"
        if row["error"] == DIED and (row["model"], row["provider"]) == ("", ""):
            yield "it does not say which model was called"
    if story.before is not None and not any(message["parked_at"] is None for message in story.before.pending):
        died = [row for row in story.rows.requests if row["error"] == DIED]
        if died and not story.handed_over and story.deaths < 2:
            yield "no turn was at work, and there is a row of a call that died"


@promise("a failed call keeps its error")
def a_failed_call_keeps_its_error(story: Story) -> Iterator[str]:
    failed = len(story.did("provider", "failed"))
    # 499: we hung up, and do not know that it failed in that moment.
    on_record = sum(1 for row in story.rows.requests if row["status_code"] >= 400)
    if on_record < failed - story.deaths - story.unwritten:
        yield f"{failed} calls failed, and {on_record} are on record as failed"


# P7: what is done is not done again


@promise("no finished call of the model is paid again")
def no_call_is_paid_again(story: Story) -> Iterator[str]:
    if story.continuation != "resume" or story.before is None or not story.before.pending:
        return
    recorded = {row["input_tokens"] for row in story.before.requests if row["error"] is None}
    done = {entry["label"] for entry in story.did_before("provider", "answered") if entry["input_tokens"] in recorded}
    for entry in story.did("provider", "asked")[len(story.did_before("provider", "asked")) :]:
        if entry["label"] in done:
            yield f"{entry['label']!r} was answered and on record, and was asked again"


@promise("what was asked with a key is answered once")
def a_key_is_answered_once(story: Story) -> Iterator[str]:
    if story.scenario.key is None or not story.continuation:
        return
    if [(each["status"], each["content"]) for each in story.resumed[-1:]] != [("completed", ANSWER)]:
        yield f"asked again, it gave {story.resumed}"
    answers = [message for message in story.rows.messages if message["content"] == ANSWER]
    if len(answers) != 1:
        yield f"the answer is there {len(answers)} times"
    if story.before is not None and any(message["content"] == ANSWER for message in story.before.messages):
        after = story.did("provider", "asked")[len(story.did_before("provider", "asked")) :]
        if any(entry["label"].startswith(QUESTION) for entry in after):
            yield "it was answered, and the model was asked again"


@promise("no tool is run twice that may not be")
def no_tool_runs_twice(story: Story) -> Iterator[str]:
    begun = Counter((entry["id"], entry["name"]) for entry in story.did("tool", "began"))
    for (call_id, name), times in begun.items():
        if times > 1 and name != "look_up":
            yield f"{name} ({call_id}) was begun {times} times"


@promise("a finished tool is not run again")
def a_finished_tool_is_not_run_again(story: Story) -> Iterator[str]:
    if story.before is None:
        return
    done = {call["tool_call_id"] for call in story.before.tool_calls if call["result"] is not None}
    known = {call["tool_call_id"] for call in story.before.tool_calls}
    if "tool_concurrency" in story.scenario.options:
        # Its row says that it was started: its thread was on its way when the turn was broken off.
        known -= {call["tool_call_id"] for call in story.before.tool_calls if call["error"] == "interrupted"}
    goes_on = story.continuation == "resume" or story.scenario.key  # with which a dead turn is gone on with, too
    for entry in story.did("tool", "began")[len(story.did_before("tool", "began")) :]:
        if entry["id"] in done:
            yield f"{entry['name']} ({entry['id']}) had its result, and was begun again"
        if not goes_on and entry["id"] in known:
            yield f"{entry['name']} ({entry['id']}) of the dead turn was begun although nobody resumed it"


@promise("a tool's result is on record before what comes next")
def a_result_is_on_record(story: Story) -> Iterator[str]:
    results = {call["tool_call_id"] for call in story.rows.tool_calls if call["result"] is not None}
    one_by_one = "tool_concurrency" not in story.scenario.options
    for index, entry in enumerate(story.ledger_before):
        if (entry["who"], entry["did"]) != ("tool", "finished") or entry["id"] in results:
            continue
        for later in story.ledger_before[index + 1 :]:
            if later["did"] == "asked" or (one_by_one and later["did"] == "began"):
                yield f"{entry['name']} ({entry['id']}) has no result, and the {later['who']} was asked for more"
                break


@promise("an interrupted tool is run again, or the model is told that nobody knows")
def an_interrupted_tool_is_not_forgotten(story: Story) -> Iterator[str]:
    if story.continuation != "resume" or story.before is None or not story.before.pending:
        return
    again = {entry["id"] for entry in story.did("tool", "began")[len(story.did_before("tool", "began")) :]}
    told = {
        message["tool_call_id"]: message["content"]
        for entry in story.did("provider", "asked")[len(story.did_before("provider", "asked")) :]
        for message in entry["messages"]
        if message["role"] == "tool"
    }
    pending = {message["id"] for message in story.before.pending}
    for call in story.before.tool_calls:
        if call["message_id"] not in pending or call["result"] is not None:
            continue
        call_id, name = call["tool_call_id"], call["name"]
        is_interrupted = call["status"] == "running" and name != "look_up"
        if is_interrupted and "not known" not in told.get(call_id, ""):
            yield f"{name} ({call_id}) was interrupted, and the model was told {told.get(call_id)!r}"
        if not is_interrupted and call_id not in again:
            yield f"{name} ({call_id}) was {call['status']}, and was not run by resume()"


# P4: what the model is shown


@promise("the model is shown a history that it can take")
def the_history_can_be_taken(story: Story) -> Iterator[str]:
    for entry in story.did("provider", "asked"):
        yield from _problems_of(entry["messages"], f"in call {entry['call']} ({entry['label']})")


def _problems_of(messages: list[Row], where: str) -> Iterator[str]:
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                yield f"{where} there is a result that nobody asked for"
            else:
                waiting.remove(message["tool_call_id"])
            if not message["content"]:
                yield f"{where} there is an empty result"
            continue
        if waiting:
            yield f"{where} {waiting} have no result"
        waiting = [call["id"] for call in message.get("tool_calls") or []]
        if message["role"] == "assistant" and not waiting and not message["content"]:
            yield f"{where} there is an empty assistant message"
    if waiting:
        yield f"{where} {waiting} have no result"
    said = [message["content"] for message in messages if message["role"] == "user"]
    texts = [text if isinstance(text, str) else text[0]["text"] for text in said]
    if texts not in ([QUESTION], [QUESTION, NEXT], [NEXT]):
        yield f"{where} the user says {texts}"


@promise("what was said is shown in the next turn")
def what_was_said_is_shown(story: Story) -> Iterator[str]:
    if not story.continuation:
        return
    shown = [entry for entry in story.did("provider", "asked") if entry["label"].startswith(NEXT)]
    if not shown:
        yield "the model was not asked the next question"
        return
    messages = shown[-1]["messages"]
    texts = [message["content"] for message in messages if message["role"] == "assistant"]
    before = story.rows.messages[:-2]
    has_question = any(message["role"] == "user" for message in before)
    users = sum(1 for message in messages if message["role"] == "user")
    if users != 1 + has_question:
        yield f"the rows have {1 + has_question} messages of the user, the model is shown {users}"
    for message in before:
        text = message["content"]
        if message["role"] == "assistant" and message["status"] == "completed" and text and text not in texts:
            yield f"the answer {text!r} is not shown"


@promise("what was shown of a saved stream survives the process")
def what_was_shown_survives(story: Story) -> Iterator[str]:
    shown = "".join(entry["text"] for entry in story.did_before("reader", "read"))
    if "save_every" not in story.scenario.options or not story.losses or not shown:
        return
    texts = [message["content"] or "" for message in story.rows.messages if message["role"] == "assistant"]
    if not any(text.startswith(shown) for text in texts):
        yield f"the reader has seen {shown!r}, and the rows have {texts}"


# P2, P6: how it ends


@promise("a turn that died leaves what on_error says")
def what_a_dead_turn_leaves(story: Story) -> Iterator[str]:
    """By "rollback" nothing, but a reply that was there whole, and what `save_every` kept; `recover` keeps what it had
    said."""
    if story.continuation != "ask" or story.before is None or story.scenario.on_error != "rollback":
        return
    if story.scenario.key:
        return  # who asks again with the key of a turn that died goes on with it
    for message in story.before.pending:
        is_kept = message["content"] and (not _asks_for_tools(message) or (message["content_raw"] or {}).get("partial"))
        left = [row for row in story.rows.messages if row["id"] == message["id"]]
        if left and not is_kept:
            yield f"its answer is still there, {left[0]['status']}"


def _asks_for_tools(message: Row) -> bool:
    rounds = (message["content_raw"] or {}).get("rounds") or [{}]
    return bool(rounds[-1].get("tool_calls"))


@promise("what was kept is not lost")
def what_was_kept_is_not_lost(story: Story) -> Iterator[str]:
    """A settled answer stays as it is; what a dead turn had said stays by on_error="keep"."""
    if story.before is None:
        return
    now = {message["id"]: message for message in story.rows.messages}
    replaced = story.scenario.name.startswith("retried")
    for message in story.before.messages:
        settled = message["status"] != "pending"
        left = now.get(message["id"])
        if settled and left is None and not (replaced and message["status"] == "failed"):
            yield f"the {message['status']} message at position {message['position']} is gone"
        if settled and left is not None and left["content"] != message["content"]:
            yield f"the message at position {message['position']} has changed"
        if not settled and message["content"] and story.continuation and left is None:
            yield f"what the model had said ({message['content']!r}) is gone"
        keeps = story.continuation == "recover" or (story.continuation and story.scenario.on_error == "keep")
        keeps = keeps and not story.scenario.key  # asked again, it gives way to the new answer
        if not settled and keeps and message["parked_at"] is None and message["content_raw"] and left is None:
            yield "the rounds of the dead turn are gone, and on_error says that they are kept"
    calls = {call["tool_call_id"] for call in story.rows.tool_calls}
    for call in story.before.tool_calls:
        if call["tool_call_id"] not in calls:
            yield f"the row of the tool call {call['tool_call_id']} is gone"
    requests = {row["id"] for row in story.rows.requests}
    for row in story.before.requests:
        if row["id"] not in requests:
            yield f"a request row of round {row['round']} is gone"


@promise("every tool that began has its row")
def every_tool_has_its_row(story: Story) -> Iterator[str]:
    known = {call["tool_call_id"]: call for call in story.rows.tool_calls}
    for entry in story.did("tool", "began"):
        if entry["id"] not in known:
            yield f"{entry['name']} ({entry['id']}) was begun, and has no row"
        elif known[entry["id"]]["status"] == "pending":
            yield f"{entry['name']} ({entry['id']}) was begun, and its row says that it was not"


@promise("nothing is left pending")
def nothing_is_left_pending(story: Story) -> Iterator[str]:
    if story.continuation and story.rows.pending:
        yield f"{len(story.rows.pending)} messages are pending"


@promise("the chat can be asked again")
def the_chat_can_be_asked_again(story: Story) -> Iterator[str]:
    if not story.continuation:
        return
    last = story.rows.messages[-2:]
    said = [(message["role"], message["status"], message["content"]) for message in last]
    if said != [("user", "completed", NEXT), ("assistant", "completed", AFTERWARDS)]:
        yield f"its last messages are {said}"


@promise("a resumed turn ends with its answer")
def a_resumed_turn_ends_with_its_answer(story: Story) -> Iterator[str]:
    if story.continuation != "resume":
        return
    for resumed in story.resumed[-1:]:
        if (resumed["status"], resumed["content"]) != ("completed", ANSWER):
            yield f"resume() gave {resumed}"
    stored = [message["content"] for message in story.rows.messages if message["role"] == "assistant"]
    if story.resumed and ANSWER not in stored:
        yield f"the answer is not stored: {stored}"
