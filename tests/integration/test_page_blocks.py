"""Tests of the blocks of the pages that are not Python: commands, JSON, YAML, Dockerfiles."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.contrib.auth.models import Permission, User
from django.core.management import get_commands, load_command_class

from django_eventsource import publish
from django_eventsource.client import Decoder
from django_eventsource.management.commands.eventsource_drain import MARGIN_SECONDS
from django_eventsource.monitoring.history_check import HistoryCheck
from tests.support.pages import PAGES, ROOT, Block, block_of, blocks, sequence
from tests.support.processes import Server, environment, serve
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

CONTAINERS = "docs/howto/containers.rst"
HISTORY = "docs/howto/read-the-history.rst"
CHECKED_ELSEWHERE = {
    "html+django": "test_pages.py, test_page_scripts.py",
    "javascript": "test_examples_react.py, test_browser_module.py",
    "js": "test_page_scripts.py",
    "jsx": "test_examples_react.py",
    "nginx": "test_proxies.py, test_first_use.py",
    "python": "test_pages.py, test_recipes.py",
    "typescript": "test_browser_module_files.py",
}
CHECKED_HERE = {"docker", "json", "sh", "text", "yaml"}


def every(*languages: str, having: str = "") -> list[Any]:
    """Return the blocks of all pages in some languages, as the parameters of a test."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name in PAGES
        for number, block in enumerate(sequence(name))
        if block.language in languages and having in block.text
    ]


def test_a_test_checks_every_language_of_the_pages() -> None:
    """Another language needs a check here first."""
    languages = {block.language for name in PAGES for block in sequence(name)}
    assert languages == CHECKED_HERE | set(CHECKED_ELSEWHERE)


# Commands


@pytest.mark.parametrize("block", every("sh"))
def test_a_shell_accepts_every_block_of_commands(block: Block) -> None:
    subprocess.run(["sh", "-n"], input=block.text, text=True, check=True)


def test_every_extra_that_a_page_installs_exists() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = "\n".join(block for name in PAGES for block in blocks(name, "sh"))
    named = set(re.findall(r"(?:django-eventsource|\.)\[(\w+)\]", text))
    assert named == set(config["options.extras_require"])


@pytest.fixture
def server(transactional_db: None) -> Iterator[Server]:
    """Run a server with a stored event, and with a user who may listen."""
    if shutil.which("curl") is None:
        pytest.skip("`curl` is not on the PATH.")
    user = User.objects.create_user("ada", password="secret")
    user.user_permissions.add(Permission.objects.get(codename="listen_event"))
    publish("chat", "ping", "hello")
    with serve("uvicorn") as server:
        yield server


def type_into_shell(block: Block, server: Server) -> str:
    """Type a block into a shell of the test project; return what it prints.

    A stream is read up to its first line.
    """
    text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    env = environment()
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    with subprocess.Popen(
        ["sh", "-ec", text.replace("-u ada ", "-u ada:secret ")],
        cwd=ROOT / "testproject",
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            if "curl -N" in text.splitlines()[-1]:
                return process.stdout.readline()
            return process.communicate(timeout=PROCESS_PATIENCE_SECONDS)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("block", every("sh", having="127.0.0.1:8000/events/"))
def test_the_requests_of_every_page_succeed(block: Block, server: Server) -> None:
    """A stream begins with an id. Every other response is JSON."""
    printed = type_into_shell(block, server)
    assert printed.startswith("id: ") or json.loads(printed)


def test_the_stored_events_of_the_page_have_the_keys_of_a_response(server: Server) -> None:
    (page,) = map(json.loads, blocks(HISTORY, "json"))
    (block,) = [block for block in sequence(HISTORY) if block.language == "sh"]
    response = json.loads(type_into_shell(block, server))
    assert list(response) == list(page)
    assert list(response["events"][0]) == list(page["events"][0])
    assert response["events"][0]["value"] == "hello"


# Bytes


@pytest.mark.parametrize("text", blocks("docs/reference/wire-format.rst", "text"))
def test_the_streams_of_the_page_contain_events(text: str) -> None:
    assert Decoder().feed(f"{text}\n\n".encode())


# Containers and proxies that the tests do not run


@pytest.mark.parametrize("block", every("yaml"))
def test_every_block_of_yaml_is_a_mapping(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


def test_the_deployment_of_the_page_selects_its_pods_and_probes_the_port_of_the_image() -> None:
    deployment = yaml.safe_load(block_of(CONTAINERS, "deployment.yaml"))["spec"]
    pod = deployment["template"]
    assert deployment["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    command = json.loads(dockerfile()["CMD"])
    port = int(command[command.index("--port") + 1])
    assert container["ports"] == [{"containerPort": port}]
    assert container["readinessProbe"]["httpGet"]["port"] == port
    assert container["livenessProbe"]["httpGet"]["port"] == port


def test_the_deployment_of_the_page_probes_the_views_and_drains_within_its_grace_period() -> None:
    pod = yaml.safe_load(block_of(CONTAINERS, "deployment.yaml"))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {
        container[probe]["httpGet"]["path"]: container[probe]["timeoutSeconds"]
        for probe in ("readinessProbe", "livenessProbe")
    }
    urls = ast.unparse(ast.parse(block_of("docs/howto/monitoring.rst", "mysite/health_urls.py")))
    assert {f"/-/{name}" for name in re.findall(r"path\('(\w+)'", urls)} == set(probes)
    assert min(probes.values()) > HistoryCheck.TIMEOUT_SECONDS
    _, _, name, *arguments = container["lifecycle"]["preStop"]["exec"]["command"]
    parser = load_command_class(get_commands()[name], name).create_parser("manage.py", name)
    seconds = float(parser.parse_args(arguments).seconds)
    assert seconds + MARGIN_SECONDS + 5 < pod["terminationGracePeriodSeconds"]


def test_the_image_of_the_page_runs_a_command_that_the_tests_run() -> None:
    """Only its address differs."""
    command = json.loads(dockerfile()["CMD"])
    command.remove("--host")
    command.remove("0.0.0.0")
    assert command in [
        shlex.split(line) for line in blocks("docs/howto/deploy.rst", "sh")[0].splitlines()
    ]


def dockerfile() -> dict[str, str]:
    """Return the last of each instruction of the page's Dockerfile."""
    (text,) = blocks(CONTAINERS, "docker")
    instructions = [line.partition(" ") for line in text.splitlines()]
    assert {name for name, _, _ in instructions} <= {
        "FROM",
        "WORKDIR",
        "ENV",
        "COPY",
        "RUN",
        "CMD",
    }
    return {name: value for name, _, value in instructions}
