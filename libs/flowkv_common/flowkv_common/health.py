"""`python -m flowkv_common.health PORT [PATH]`: whether a service of this host is well, by its exit code.

What a container's health check runs: it needs no curl. Loads nothing but the standard library.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 3.0


def problem(port: int, path: str) -> str | None:
    """Why the service is not well, in its own words where it has some; None if it is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(1000).decode(errors='replace').strip()}"
    except OSError as error:
        return str(error)


def main(port: int, path: str = "/health/ready") -> int:
    found = problem(port, path)
    print(found or "well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:3]))
