"""Tests of the password threads in a process that forks."""

from __future__ import annotations

from tests.support.processes import run_python


def test_a_fork_hashes_passwords_in_its_own_threads() -> None:
    code = """
import asyncio, os, warnings
from django.test import AsyncRequestFactory
from django_eventsource.access import basic_login as logins
warnings.simplefilter("ignore")

logins.authenticate = lambda request, username, password: username
def login():
    request = AsyncRequestFactory().get("/")
    return asyncio.run(asyncio.wait_for(logins.check_password(request, "ada", "x"), 10))
assert login() == "ada"
pid = os.fork()
if pid == 0:
    os._exit(0 if login() == "ada" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_python(code).strip() == "0"
