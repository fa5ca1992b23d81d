"""A process that dies without a word at its N-th step: what a SIGKILL there leaves behind."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

Step: TypeAlias = Callable[..., Any]


def dies_at(number: int, work: Step, prepare: Callable[[Callable[[Step], Step]], None]) -> bool:
    """Do `work` in a process that dies just before its `number`-th step. Did it? What fails in it fails the test.

    `prepare` is called in that process, with what makes a step of a function.
    """
    pid = os.fork()
    if pid == 0:
        left = number

        def dying(real: Step) -> Step:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return real(*arguments, **named)

            return call

        try:
            prepare(dying)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the rim of a process
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), status
    return status == 9
