"""Starting the processes of a script so that they can say why they end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_autosp.faults import ANSWER, GRACE

__all__ = ["ScriptLauncher"]


class _Observer(_ChildProcessObserver):
    """Lightning's kills all processes within five seconds of one that failed; here they get the time to end by themselves."""

    def __init__(self, processes: list[Any], tells: Callable[[], bool]) -> None:
        super().__init__(os.getpid(), processes, sleep_period=1)
        self._tells = tells

    @override
    def _terminate_all(self) -> None:
        if self._tells():  # else ranks would wait for the one that is gone
            time.sleep(2 * ANSWER + GRACE)
        super()._terminate_all()


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's, with an observer that lets ranks say which one failed, and why, before it kills what is left."""

    def __init__(self, cluster_environment: Any, num_processes: int, num_nodes: int, tells: Callable[[], bool]) -> None:
        """Start nothing yet.

        Args:
            cluster_environment: Lightning's.
            num_processes: On this node.
            num_nodes: Of the job.
            tells: Whether processes have come so far that ranks tell each other of failures, and end (`faults.Watch`).
        """
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._tells = tells

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            _Observer(self.procs, self._tells).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)
