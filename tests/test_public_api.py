"""What `import llm_orm` offers, and what it costs."""

import inspect
import subprocess
import sys
import time
from importlib.metadata import version
from types import ModuleType

import pytest

import llm_orm
from llm_orm import errors, testing
from llm_orm.checks import OF_ONE_TURN, OVERRIDES
from llm_orm.errors import LlmOrmError
from llm_orm.options import TurnOptions


def test_the_public_names_are_the_ones_that_are_there() -> None:
    there = {
        name for name, value in vars(llm_orm).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(llm_orm.__all__) == there


@pytest.mark.parametrize("module", [llm_orm, testing])
def test_the_public_names_are_sorted_and_unique(module: ModuleType) -> None:
    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert module.__all__ == sorted(set(module.__all__), key=order)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module", [llm_orm, testing])
def test_every_public_name_says_what_it_is(module: ModuleType) -> None:
    for name in module.__all__:
        text = inspect.getdoc(getattr(module, name)) or ""
        assert text, name
        assert not text.startswith(f"{name}("), f"{name}: a dataclass writes that itself"


def test_every_public_method_says_what_it_does() -> None:
    silent = []
    for owner in (llm_orm.Chat, llm_orm.Store, llm_orm.Tool, llm_orm.LLM, llm_orm.Retries, llm_orm.ToolCall):
        for name, member in vars(owner).items():
            member = member.fget if isinstance(member, property) else member
            if not name.startswith("_") and inspect.isfunction(member) and not member.__doc__:
                silent.append(f"{owner.__name__}.{name}")
    assert set(silent) <= PLAIN_PROPERTIES


PLAIN_PROPERTIES = {
    # Their class's docstring lists them.
    *(f"Chat.{name}" for name in ("id", "model", "provider", "instructions", "metadata")),
    # These are litellm's own names.
    *(f"LLM.{name}" for name in ("completion", "acompletion", "get_llm_provider")),
    "Tool.is_async",
}


def test_every_error_is_public_and_below_one_root() -> None:
    own = {
        name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(own) <= set(llm_orm.__all__)
    assert all(issubclass(value, LlmOrmError) for value in own.values())
    for branch in ("TryAgain", "WrongCall", "WrongSetup", "TurnFailed"):
        assert own[branch].__bases__ == (LlmOrmError,)
    leaves = [value for value in own.values() if not value.__subclasses__()]
    assert all(issubclass(leaf, tuple(LlmOrmError.__subclasses__())) for leaf in leaves)


def test_the_docstring_of_an_error_is_its_message() -> None:
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, LlmOrmError):
            assert str(error()) == error.__doc__, name
            assert str(error("more exactly")) == "more exactly"
            assert name in (errors.__doc__ or "")


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    for error in LlmOrmError.__subclasses__():
        assert f"{error.__name__}" in drawn
        below = drawn[drawn.index(error.__name__) :]
        for leaf in error.__subclasses__():
            assert leaf.__name__ in below or leaf.__module__ != errors.__name__


def run(program: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, timeout=60, capture_output=True, text=True
    )
    return ran.stdout.strip()


def test_importing_llm_orm_imports_no_litellm_and_no_database_driver_of_postgresql() -> None:
    program = """
import sys, llm_orm, llm_orm.testing
heavy = ("litellm", "openai", "httpx", "aiohttp", "tiktoken", "tokenizers", "rich")
print([name for name in heavy if name in sys.modules])
"""
    assert run(program) == "[]"


def test_importing_llm_orm_takes_a_fraction_of_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        run("import llm_orm")
        return time.perf_counter() - started

    assert any(seconds() < 1.5 for _ in range(8))  # litellm alone takes longer, however idle the machine


def test_the_version_of_the_package_can_be_asked() -> None:
    assert version("llm-orm").count(".") == 2


def test_type_checkers_know_every_option_of_a_turn():
    assert set(TurnOptions.__annotations__) == {*OF_ONE_TURN, *OVERRIDES, "inputs"}
