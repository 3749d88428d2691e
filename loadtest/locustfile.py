"""
What Locust loads: users, the load's shape, and the wiring between them.

`python -m loadtest` starts Locust with it; `locust -f loadtest/locustfile.py --host …`
works, too, with Locust's web page.
"""

import signal
import sys
from pathlib import Path

# Locust puts the file's folder on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from locust import LoadTestShape, events, runners

from loadtest.conductor import Wiring
from loadtest.lifeline import take_children_along
from loadtest.options import add_options
from loadtest.page import partial_page
from loadtest.users import Churner, LimitBreaker, Publisher, RunReader, SlowReader, Subscriber

__all__ = ["Churner", "LimitBreaker", "Publisher", "RunReader", "Shape", "SlowReader", "Subscriber"]

# Locust's --processes forks workers, and forgets them where the master can't listen or is
# killed: they would wait for it, or join another run's master on the same port.
take_children_along(signal.SIGKILL)

# Progress is shown every two seconds; Locust's three are too slow for it.
runners.WORKER_REPORT_INTERVAL = 1.0
# Locust takes a worker that is silent for 3 s for dead, and gives its users to the others
# while it still holds them: 10,000 streams became 13,600 on a machine that was full.
runners.HEARTBEAT_LIVENESS = 30
runners.WorkerNode.__init__.__defaults__ = (runners.STATE_INIT, runners.HEARTBEAT_LIVENESS)

_wiring: Wiring | None = None
_complain = sys.excepthook


def _excepthook(kind, error, trace):
    # Ctrl-C while the master waits for its workers; who started it says so.
    if kind is not KeyboardInterrupt:
        _complain(kind, error, trace)


sys.excepthook = _excepthook


@events.init_command_line_parser.add_listener
def _options(parser, **_):
    add_options(parser, locust=True)


@events.init.add_listener
def _init(environment, web_ui, **_):
    global _wiring  # noqa: PLW0603 (Locust makes the shape before there is an environment)
    _wiring = Wiring(environment)
    if web_ui:

        @web_ui.app.route("/streams")
        def streams():
            assert _wiring is not None
            return partial_page(_wiring.conductor)


class Shape(LoadTestShape):
    """The scenario's stages."""

    def tick(self):
        assert _wiring is not None
        return _wiring.tick()
