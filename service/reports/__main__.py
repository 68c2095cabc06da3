"""`python -m service.reports TEMPLATE`: content as JSON on stdin, a PDF on stdout. A process of its own: see `pdf`."""

import sys

from service.reports.typesetting import typeset

sys.stdout.buffer.write(typeset(sys.argv[1], sys.stdin.buffer.read()))
