"""Run by test_standalone: `expunge up` with the real stores and a small web server in place of the API.

Arguments: state directory, port.
"""

import http.client
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.standalone.programs import HOST, Shape
from service.standalone.supervisor import Program
from service.standalone.up import serve


def programs(shape: Shape, env: Mapping[str, str]) -> Sequence[Sequence[Program]]:
    def ready() -> bool:
        connection = http.client.HTTPConnection(HOST, shape.port, timeout=1.0)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    argv = (sys.executable, "-m", "http.server", str(shape.port), "--bind", HOST)
    return ([Program(name="api", argv=argv, env=env, ready=ready)],)


if __name__ == "__main__":
    directory, port = sys.argv[1:]
    shape = Shape(int(port), replicas=0, trainers=0)
    sys.exit(serve(Path(directory), shape, programs=programs, first_key=lambda _url: "the-first-key"))
