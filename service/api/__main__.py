"""`python -m service.api --host HOST --port PORT`: the control API as a program."""

import argparse
import sys

import uvicorn

from service.api.app import create_app
from service.domain.errors import ExpungeError
from service.logs import configure_logs
from service.settings import settings
from service.store import migrate


def main() -> int:
    """Serve until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.api", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700)
    chosen = parser.parse_args()
    configure_logs("api")
    try:
        migrate.check(settings().database_url)
        app = create_app(settings())
    except (ExpungeError, migrate.SchemaError, ValueError) as error:
        sys.stderr.write(f"the API cannot start: {error}\n")
        return 1
    uvicorn.run(
        app,
        host=chosen.host,
        port=chosen.port,
        loop="uvloop",
        http="httptools",
        access_log=False,  # paths hold request ids
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
