"""The certificates of the commands."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

from django_eventsource.management import cli
from tests.unit.test_cli import options


def test_the_authority_of_a_cafile_is_trusted(tmp_path: Path) -> None:
    """The context verifies certificates and host names."""
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(file)
    context = cli.make_verify(options(cafile=str(file)))
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1
