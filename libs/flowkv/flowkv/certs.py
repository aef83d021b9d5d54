"""A private authority and a certificate for each service, to try TLS with.

  flowkv certs FOLDER --host 10.0.0.1 --host kv.example

FOLDER then holds ca.pem, and NAME.pem and NAME.key of gateway, scheduler, node, nats and operator. Each
certificate is for its service's name, those of gateway and nats also for localhost and the hosts named here.
Run it again before they expire. The authority stays, so services trust old and new ones alike. So do the
hosts, unless you name others.
"""

from __future__ import annotations

from pathlib import Path

from flowkv.terminal import console, make_parser
from flowkv_common.errors import CannotStart

DAYS = 365


def main(argv: list[str]) -> int:
    parser = make_parser("certs", __doc__, needs_nats=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="a name or address of gateway or NATS"
    )
    parser.add_argument("--days", type=int, default=DAYS, help=f"how long they are valid (default {DAYS})")
    options = parser.parse_args(argv)
    try:
        from flowkv.authority import CA_DAYS, NAMES, make_certificates
    except ModuleNotFoundError as error:
        raise CannotStart(f"{error.name} is not installed: pip install 'flowkv[certs]'") from None

    if not 1 <= options.days <= CA_DAYS:
        raise CannotStart(f"--days is {options.days}, it must be from 1 to {CA_DAYS}, as the authority's own")
    try:
        make_certificates(options.folder, options.host, options.days)
    except OSError as error:
        raise CannotStart(f"{options.folder}: {error.strerror}") from None
    console().print(f"{options.folder}: ca.pem; {', '.join(f'{name}.pem and .key' for name in NAMES)}")
    console().print("A service needs ca.pem and its own two files. Keep ca.key to yourself.")
    return 0
