"""Processes that talk at once, as the workers of a web server do: `python crew.py '{"url": …, …}'` forks them.

Each waits until all are there, talks in several threads, and writes into one ledger, a line of JSON each, what the
provider was asked and what its callers were told. `Crew` starts them, `check_nothing_is_lost` compares.
"""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_orm import ChatBusy, LlmOrmError, ReplyNotSaved, Store, check, connect, load_chat, tool
from llm_orm.recovery import recover
from llm_orm.testing import Call, ProviderError, ScriptedLLM


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


class Ledger:
    """What happened, in the order in which it did; a line is written whole, whoever writes another."""

    def __init__(self, path: Path | str):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, kind: str, **values: Any) -> None:
        os.write(self.file, (json.dumps({"kind": kind, **values}) + "\n").encode())


class Model(ScriptedLLM):
    """A model whose every call is in the ledger before it is answered."""

    def __init__(self, name: str, ledger: Ledger):
        super().__init__(provider=name)
        self.name, self.ledger = name, ledger

    def says(self, *script: Any) -> "Model":
        def booked(scripted: Any) -> Callable[[dict[str, Any]], Any]:
            def reply(keywords: dict[str, Any]) -> Any:
                fails = isinstance(scripted, BaseException)
                self.ledger.write("call", by=self.name, id=None if fails else f"scripted-{len(self.requests)}")
                return scripted(keywords) if callable(scripted) else scripted

            return reply

        self.script[:] = map(booked, script)
        return self


async def _read(stream: Any, chunks: int | None = None) -> Any:
    async with stream:
        async for _ in stream:
            chunks = None if chunks is None else chunks - 1
            if chunks == 0:
                break
    return stream.message


def ask_in_one_way(chat: Any, way: str, text: str, **options: Any) -> Any:
    """The stored reply; None where the way is to leave the stream before its end."""
    match way:
        case "ask":
            return chat.ask(text, **options)
        case "ask_stream":
            with chat.ask_stream(text, **options) as stream:
                for _ in stream:
                    pass
            return stream.message
        case "left":
            with chat.ask_stream(text, **options) as stream:
                next(stream)
        case "aask":
            return asyncio.run(chat.aask(text, **options))
        case "aask_stream":
            return asyncio.run(_read(chat.aask_stream(text, **options)))
        case "aleft":
            return asyncio.run(_read(chat.aask_stream(text, **options), 1))


def talk(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    """So many turns, or for so many seconds, or until a file is there: in every way, with tools and without, some of
    which fail; calm: only those that neither fail nor are left."""
    chance, model, calm = random.Random(f"{orders.get('seed', 0)} {name}"), Model(name, ledger), orders.get("calm")
    until, file = time.monotonic() + orders.get("seconds", 3600), Path(orders.get("until", "never"))
    weather, fails = [Call("get_weather", city="London")], ProviderError(400)
    for number in range(orders.get("turns", 1_000_000)):
        if time.monotonic() > until or file.exists():
            return
        text = f"{name} {number}"
        way = chance.choice(["ask", "ask_stream", "aask", "aask_stream", *(() if calm else ("left", "aleft"))])
        said = [[f"re: {text}"], [weather, f"re: {text}"], *(() if calm else ([fails], [weather, fails]))]
        script = [f"re: {text}"] if way in ("left", "aleft") else chance.choice(said)
        chat = told(ledger, name, load_chat, store, chance.choice(orders["chats"]), llm=model.says(*script))
        if chat is not None:
            wait = chance.choice([0, orders.get("wait", 60)])
            told(ledger, name, ask_in_one_way, chat, way, text, wait=wait, tools=[get_weather])


def told(ledger: Ledger, name: str, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do it, and write down what the caller was told."""
    try:
        found = act(*arguments, **options)
    except ChatBusy:
        ledger.write("busy", by=name)
    except ProviderError:
        ledger.write("failed", by=name)
    except ReplyNotSaved as error:
        ledger.write("not saved", by=name, content=error.reply.content, id=error.reply.provider_request_id)
    except LlmOrmError as error:
        ledger.write("error", by=name, type=type(error).__name__, text=str(error))
    except Exception as error:  # which is none of those that a caller is promised
        ledger.write("error", by=name, type=type(error).__name__, text=traceback.format_exc())
    else:
        if act is load_chat:
            return found
        if found is None:
            ledger.write("left", by=name)
        else:
            ledger.write("reply", by=name, message=str(found.id), content=found.content)


def work(number: int, orders: dict[str, Any]) -> None:
    ledger = Ledger(orders["ledger"])
    url = orders["url"].replace("crew_", f"crew_{number}_")  # the name of its connections, where the test looks at them
    with connect(url, pool_size=orders["pool_size"]) as store:
        with ThreadPoolExecutor(orders["threads"]) as threads:
            names = [f"worker-{number}.{thread}" for thread in range(orders["threads"])]
            job = JOBS[orders["job"]]
            for done in [threads.submit(job, store, ledger, name, orders) for name in names]:
                done.result()


def ask_with_a_key(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    """The same question with the same key, in a way of its own; the first of two threads waits for the answer."""
    for number, chat_id in enumerate(orders["chats"]):
        way = ["ask", "ask_stream", "aask", "aask_stream"][sum(map(ord, name)) % 4]
        chat = load_chat(store, chat_id, llm=Model(name, ledger).says(lambda keywords: f"Booked by {name}."))
        options = {"wait": 60 if name.endswith("0") else 0, "key": f"request {number}"}
        told(ledger, name, ask_in_one_way, chat, way, "Book it.", **options)


def hang(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    """Ask, with a tool that is run and a model that then says nothing more, until the process is killed."""
    model = Model(name, ledger).says(Call("get_weather", city="London"), lambda keywords: threading.Event().wait())
    taken = [each for number, each in enumerate(orders["chats"]) if name.endswith(f"-{number}.0")]
    load_chat(store, taken[0], llm=model, tools=[get_weather]).ask("Weather?")


def resume(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    for chat_id in orders["chats"]:
        chat = load_chat(store, chat_id, llm=Model(name, ledger).says("It rains."), tools=[get_weather])
        told(ledger, name, chat.resume)


def end_dead_turns(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    for each in recover(store, older_than=600):
        ledger.write("recovered", by=name, message=str(each.message_id))


def resume_or_end(store: Store, ledger: Ledger, name: str, orders: dict[str, Any]) -> None:
    job = resume if name < "worker-2" else end_dead_turns
    job(store, ledger, name, orders)


JOBS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (talk, ask_with_a_key, hang, resume, end_dead_turns, resume_or_end)
}


def main(orders: dict[str, Any]) -> int:
    logging.getLogger("llm_orm").addHandler(logging.NullHandler())  # what goes wrong is told, and written down
    gate, opened = os.pipe()
    children = []
    for number in range(orders["processes"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        failed = 1
        try:
            os.close(opened)
            os.read(gate, 1)  # which ends when the parent closes its end: for all at once
            work(number, orders)
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(failed)
    os.close(opened)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


class Crew:
    """Processes at work; `ledger` is what they wrote until now."""

    def __init__(self, path: Path, **orders: Any):
        self.path = path
        path.touch()
        given = {"threads": 1, "pool_size": 2, "job": "talk", **orders, "ledger": str(path)}
        given["chats"] = [str(chat) for chat in given["chats"]]
        command = [sys.executable, __file__, json.dumps(given)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    @property
    def is_at_work(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = 120) -> list[dict[str, Any]]:
        """The ledger, once all have ended, and ended well."""
        _, problems = self.process.communicate(timeout=seconds)
        assert problems == "", problems
        assert self.process.returncode == 0
        return self.ledger

    def kill(self) -> None:
        """End all of them at once, as the lack of power does."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # they have ended
        if self.process.stderr and not self.process.stderr.closed:
            self.process.communicate()


@contextmanager
def crew(path: Path, **orders: Any) -> Iterator[Crew]:
    """A crew that is gone when the block ends, however it ends."""
    started = Crew(path, **orders)
    try:
        yield started
    finally:
        started.kill()


def check_nothing_is_lost(store: Store, ledger: list[dict[str, Any]]) -> Counter[str]:
    """Compare the rows with what the provider was asked and the callers were told; how often what happened."""
    message, request, call = store.records.message, store.records.request, store.records.tool_call
    with store.connection():
        messages: list[Any] = list(message.select().order_by(message.chat, message.position))
        requests: list[Any] = list(request.select())
        calls: list[Any] = list(call.select())
    places: dict[Any, list[int]] = {}
    for each in messages:
        places.setdefault(each.chat_id, []).append(each.position)
    assert all(positions == list(range(len(positions))) for positions in places.values())
    assert {each.status for each in messages} <= {"completed"}
    assert {each.status for each in calls} <= {"completed", "failed", "rejected"}

    replies = {str(each.id): each.content for each in messages if each.role == "assistant"}
    assert {each["message"]: each["content"] for each in ledger if each["kind"] == "reply"} == replies

    handed_over = {(each["by"], each["id"]) for each in ledger if each["kind"] == "not saved"}
    answered = {(each["by"], each["id"]) for each in ledger if each["kind"] == "call" and each["id"]}
    on_record = [(each.provider, each.provider_request_id) for each in requests if each.provider_request_id]
    assert len(on_record) == len(set(on_record))
    left = {each["by"] for each in ledger if each["kind"] in ("left", "failed")}
    assert set(on_record) <= answered
    assert all(by in left for by, _ in answered - set(on_record) - handed_over)
    if not handed_over:
        asked = Counter(each["by"] for each in ledger if each["kind"] == "call")
        assert Counter(each.provider for each in requests) == asked
    assert check(store) == []
    return Counter(each["kind"] for each in ledger)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
