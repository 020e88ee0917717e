"""Who may look."""

import signal
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from dashboard_client import Elements, client_of

from llm_orm import connect
from llm_orm.dashboard import create_app
from llm_orm.errors import InvalidValue
from llm_orm_cli import main

TOKEN = "correct horse battery staple"


@pytest.fixture
def locked(sqlite_store) -> Any:
    with client_of(create_app(sqlite_store, token=TOKEN)) as client:
        yield client


def log_in(client: Any, token: str = TOKEN, address: str = "/login") -> Any:
    return client.post(address, data={"token": token})


def test_a_page_leads_to_the_login_and_from_there_back(locked):
    answer = locked.get("/models?model=gpt-4o")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fmodels%3Fmodel%3Dgpt-4o")
    form = locked.get(answer.headers["location"])
    assert form.status_code == 200
    assert "/login?next=/models%3Fmodel%3Dgpt-4o" in Elements(form.text).attributes("action")
    done = locked.get(log_in(locked, address=answer.headers["location"]).headers["location"])
    assert (done.status_code, done.headers["location"]) == (303, "/models?model=gpt-4o")
    assert locked.get("/models?model=gpt-4o").status_code == 200


def test_a_login_that_the_browser_did_not_keep_says_so(locked):
    back = log_in(locked).headers["location"]
    locked.cookies.clear()
    answer = locked.get(back)
    assert answer.status_code == 401
    assert "The token is right, but the browser did not send the login back" in Elements(answer.text).text
    assert "for the path /:" in answer.text


def test_dashboards_on_one_host_do_not_log_each_other_out(sqlite_store):
    def cookie_of(token: str, root: str = "") -> str:
        with client_of(create_app(sqlite_store, token=token), root_path=root) as client:
            return log_in(client, token).headers["set-cookie"].partition(";")[0]

    ours, theirs = cookie_of(TOKEN), cookie_of(TOKEN + "!")
    name, _, _ = ours.partition("=")
    assert name != theirs.partition("=")[0]  # a browser keeps both
    with client_of(create_app(sqlite_store, token=TOKEN)) as client:
        for sent in (f"{theirs}; {ours}", f"{name}=1.old; {ours}", f'{ours}; {name}=1.old; a="b', f"; =;{ours}"):
            assert client.get("/", headers={"cookie": sent}).status_code == 200, sent
        for sent in (theirs, f"{name}=1.old", f"x{ours}"):
            assert client.get("/", headers={"cookie": sent}).status_code == 303, sent


def test_the_cookie_is_not_the_token_and_no_script_reads_it(locked):
    cookie = log_in(locked).headers["set-cookie"]
    assert TOKEN not in cookie
    attributes = {each.strip().lower() for each in cookie.split(";")}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert "secure" not in attributes
    secure = client_of(create_app(connect("sqlite:///:memory:"), token=TOKEN))
    secure.base_url = "https://llm.example.com"
    assert "; Secure" in log_in(secure).headers["set-cookie"]


def test_a_wrong_token_is_told_of_and_lets_nobody_in(locked):
    for wrong in ("", TOKEN[:-1], TOKEN + "x", "x" * 5000, "ü\udcff".encode(errors="surrogatepass").decode("latin-1")):
        answer = log_in(locked, wrong)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert "That is not the token" in answer.text
    assert locked.post("/login", data={"token": TOKEN, "more": "x" * 5000}).status_code == 401  # no form is so long
    assert locked.get("/").status_code == 303


def test_a_cookie_that_we_did_not_make_is_none(locked):
    log_in(locked)
    ((name, good),) = locked.cookies.items()
    ends, _, proof = good.partition(".")
    locked.cookies.clear()
    for bad in (
        "",
        ".",
        ends,
        f"{int(ends) + 1}.{proof}",
        f"{ends}.{proof[:-1]}0x",
        f"9{ends}.{proof}",
        "9" * 30 + ".",
    ):
        answer = locked.get("/", headers={"cookie": f"{name}={bad}"})
        assert answer.status_code == 303, bad
    assert locked.get("/", headers={"cookie": f"{name}={good}"}).status_code == 200


def test_a_login_ends_by_itself_and_by_logging_out(sqlite_store, monkeypatch):
    app = create_app(sqlite_store, token=TOKEN)
    client = client_of(app)
    with monkeypatch.context() as patch:
        patch.setattr("llm_orm.dashboard.access.LOGIN_LASTS_S", -1)
        past = log_in(client).headers["set-cookie"].partition(";")[0]
    assert client.get("/", headers={"cookie": past}).status_code == 303
    log_in(client)
    assert client.get("/models").status_code == 200
    assert client.post("/logout").status_code == 303
    assert client.get("/models").status_code == 303


def test_a_cookie_of_another_token_is_none(sqlite_store, locked):
    log_in(locked)
    (good,) = locked.cookies.values()
    other = client_of(create_app(sqlite_store, token=TOKEN + "!"))
    log_in(other, TOKEN + "!")
    (name,) = other.cookies
    other.cookies.clear()
    assert other.get("/", headers={"cookie": f"{name}={good}"}).status_code == 303


def test_a_script_sends_the_token_itself(locked):
    script = {"accept": "*/*"}
    assert locked.get("/models.json", headers=script).status_code == 401
    assert locked.get("/metrics", headers=script).headers["www-authenticate"] == "Bearer"
    for given, status, said in (
        (f"Bearer {TOKEN}", 200, ""),
        (f"bearer {TOKEN}", 200, ""),
        ("Bearer x", 401, "The Bearer token is not the token of this dashboard."),
        (f"Bearer {TOKEN}x", 401, "The Bearer token is not the token of this dashboard."),
        ("Bearer", 401, "Needs the token of the dashboard: Authorization: Bearer …\n"),
        (f"Basic {TOKEN}", 401, "There came an Authorization of another kind, 'Basic'"),
    ):
        for path in ("/models.json", "/metrics"):
            answer = locked.get(path, headers={**script, "authorization": given})
            assert (answer.status_code, said in answer.text) == (status, True), (given, path)
    assert "Needs the token" in locked.get("/models.json", headers=script).text


@pytest.mark.parametrize(
    "target", ["//evil.example", "/\\evil.example", "https://evil.example", "\n/x", "/x\r\nSet-Cookie:a=b"]
)
def test_the_login_leads_to_no_other_site(locked, target):
    answer = locked.post("/login", params={"next": target}, data={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F&done=1")
    assert locked.get("/login", params={"next": target}).headers["location"] == "/"  # to who is logged in already


def test_a_token_that_can_be_guessed_is_refused(sqlite_store):
    with pytest.raises(InvalidValue, match="at least 16 characters"):
        create_app(sqlite_store, token="secret")


# Names


@pytest.mark.parametrize(
    ("host", "options", "status"),
    [
        ("127.0.0.1:8377", {}, 200),
        ("localhost", {}, 200),
        ("[::1]:8377", {}, 200),
        ("evil.example", {}, 400),
        ("127.0.0.1.evil.example:8377", {}, 400),
        ("", {}, 400),
        ("llm.example.com", {"hosts": ["llm.example.com"]}, 200),
        ("LLM.example.com:443", {"hosts": "llm.example.com"}, 200),
        ("localhost", {"hosts": ["llm.example.com"]}, 400),
        ("any.example", {"hosts": "*"}, 200),
        ("any.example", {"token": TOKEN}, 200),
        ("any.example", {"token": TOKEN, "hosts": ["llm.example.com"]}, 400),
    ],
)
def test_without_a_token_it_answers_under_the_names_of_this_machine(sqlite_store, host, options, status):
    client = client_of(create_app(sqlite_store, **options))
    answer = client.get("/", headers={"host": host, "authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == status
    assert status == 200 or "hosts=" in answer.text


def test_a_name_that_is_none_breaks_nothing(locked):
    for path, status in (("/nothing", 404), ("/?nonsense=1", 400), ("/models.json", 200)):
        answer = locked.get(path, headers={"host": "[", "authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == status


# Only reading


def test_nothing_but_reading_is_allowed(locked):
    locked.headers["authorization"] = f"Bearer {TOKEN}"
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        for path in ("/", "/models", "/chats/x", "/static/dashboard.css", "/metrics"):
            answer = locked.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert locked.put("/login").status_code == 405


def test_every_answer_has_the_headers_that_keep_it_to_itself(locked):
    answers = [
        locked.get("/login"),
        locked.get("/"),
        locked.post("/"),
        log_in(locked, "wrong"),
        log_in(locked),
        locked.get("/"),
        locked.get("/models.csv"),
        locked.get("/?nonsense=1"),
        locked.get("/nothing"),
        locked.get("/static/dashboard.css"),
        locked.get("/static/nothing"),
        locked.get("/", headers={"accept": "*/*", "authorization": "Bearer x"}),
    ]
    assert [each.status_code for each in answers] == [200, 303, 405, 401, 303, 200, 200, 400, 404, 200, 404, 401]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        is_static = "/static/d" in str(answer.url)
        assert answer.headers["cache-control"] == ("public, max-age=31536000, immutable" if is_static else "no-store")


# The command


def test_the_command_lets_nobody_in_from_elsewhere_without_a_token():
    done = CliRunner().invoke(main, ["dashboard", "--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "--token" in done.output


def test_a_root_path_that_is_none_is_refused_in_a_line():
    done = CliRunner().invoke(main, ["dashboard", "--root-path", "http://x/{y}"])
    assert done.exit_code == 2
    assert "'http://x/{y}' is not a path of letters, digits and slashes, such as /llm" in done.output.splitlines()[-1]


def test_the_command_serves_until_it_is_interrupted(sqlite_store):
    import httpx

    path = sqlite_store.database.database
    with sqlite_store.connection():
        chat = sqlite_store.records.chat.create(model="gpt-4o", user_id="u_1")  # a column that nobody tells it of
        call = {"model": "gpt-4o", "provider": "openai", "status_code": 200, "duration_ms": 1}
        sqlite_store.records.request.create(chat=chat, **call)
    command = [
        sys.executable,
        "-c",
        "from llm_orm_cli import main; main()",
        "dashboard",
        "--database-url",
        f"sqlite:///{path}",
    ]
    options = ["--port", "0", "--token", "auto", "--root-path", "llm"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[4]
        token = process.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        assert address.endswith("/llm/")
        with httpx.Client(base_url=address) as client:
            answer = client.get("users.json", headers={"authorization": f"Bearer {token}"})
            assert (answer.status_code, [row["user_id"] for row in answer.json()]) == (200, ["u_1"])
            assert client.get("models.json").status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
