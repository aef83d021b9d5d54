"""`python -m flowkv_common.health PORT [PATH]`: whether a service of this host is well, by its exit code.

What a container's health check runs: it needs no curl. Loads nothing but the standard library.
"""

from __future__ import annotations

import http.client
import sys

TIMEOUT_S = 3.0


def problem(port: int, path: str) -> str | None:
    """Why the service is not well, in its own words where it has some; None if it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status == 200:
            return None
        return f"{response.status}: {response.read(1000).decode(errors='replace').strip()}"
    except (OSError, http.client.HTTPException) as error:  # also one that ends while it answers
        return str(error) or type(error).__name__
    finally:
        connection.close()


def main(port: int, path: str = "/health/ready") -> int:
    found = problem(port, path)
    print(found or "well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:3]))
