"""Runs proxies with the configurations that the documentation shows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES, free_port, wait_for_port
from tests.support.waiting import PROCESS_PATIENCE_SECONDS


@dataclass(frozen=True)
class Proxy:
    """A proxy, and its file in ``docs/examples/nginx``."""

    program: str
    file: str
    options: tuple[str, ...]
    """The options of the program, up to the name of the file."""
    end: signal.Signals
    """The signal that ends the proxy and its workers at once."""

    @contextmanager
    def run(
        self, directory: Path, server_port: int, *changes: tuple[str, str]
    ) -> Iterator[tuple[str, int]]:
        """Run the proxy in front of a server during a block, and yield its address.

        :param changes: texts of the file, each with the text that replaces it.
        """
        folders = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
        program = shutil.which(self.program, path=os.pathsep.join(folders))
        if program is None:
            pytest.skip(f"`{self.program}` is not on the PATH.")
        port = free_port()
        text = (EXAMPLES / "nginx" / self.file).read_text()
        for old, new in [
            *changes,
            (":8080", f":{port}"),
            ("127.0.0.1:8000", f"127.0.0.1:{server_port}"),
        ]:
            assert old in text
            text = text.replace(old, new)
        (directory / self.file).write_text(text)
        path = directory / "proxy.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [program, *self.options, self.file],
                cwd=directory,
                env={"HOME": str(directory)},
                stdout=log,
                stderr=log,
            )
        try:
            wait_for_port(port, process, path)
            yield ("127.0.0.1", port)
        finally:
            process.send_signal(self.end)
            process.wait(PROCESS_PATIENCE_SECONDS)


# The workers of nginx would outlive a process that is killed.
NGINX = Proxy("nginx", "nginx.conf", ("-p", ".", "-g", "daemon off;", "-c"), signal.SIGTERM)
# Caddy would wait for open streams. It has no workers.
CADDY = Proxy("caddy", "Caddyfile", ("run", "--adapter", "caddyfile", "--config"), signal.SIGKILL)
every_proxy = pytest.mark.parametrize("proxy", [NGINX, CADDY], ids=lambda proxy: proxy.program)
