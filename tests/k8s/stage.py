"""
A cluster and its audience, in one thread of their own: the network is the thread's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.k8s.audience import Audience
from tests.k8s.cluster import Cluster


class Stage:
    """
    Runs *objects* until all *workloads* are settled, then lets the audience in.

    Args:
        secrets: as `make secrets` would have made them.
        tree: the application's source.
    """

    def __init__(
        self, objects: list[dict[str, Any]], secrets: dict[str, dict[str, str]], tree: Path, workloads: tuple[str, ...]
    ) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.cluster = Cluster(objects, secrets, tree)
        self.audience: Audience | None = None
        try:
            self(lambda: self._enter(workloads))
        except BaseException:
            self.close()
            raise

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Run *work* on the stage."""
        return self._thread.submit(work).result()

    def _enter(self, workloads: tuple[str, ...]) -> None:
        self.cluster.__enter__()
        self.cluster.wait(*workloads, seconds=60)
        self.audience = Audience(self.cluster)

    def close(self) -> None:
        """End all."""
        if self.audience is not None:
            self.audience.stop()
        self(lambda: self.cluster.__exit__(None, None, None))
        self._thread.shutdown()
