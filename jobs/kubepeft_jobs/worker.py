"""One worker of a stage: runs it and tells the supervisor how it ended. Started by the supervisor, never by hand."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading

from kubepeft import errors, logs, stage
from kubepeft_jobs import imports, memory, progress
from kubepeft_jobs.saved import Saved
from kubepeft_jobs.supervisor import EXIT_OUT_OF_MEMORY, told

log = logging.getLogger("kubepeft.worker")


def main() -> int:
    logs.configure()
    _die_with_supervisor()
    document = stage.loads(os.environ[stage.ENV_STAGE])
    try:
        result = _run(document)
    except Saved as saved:
        log.info("%s", saved)
        progress.send_result({"message": str(saved), **saved.fields})
        return errors.EXIT_SAVED
    except errors.KubepeftError as error:
        log.error("%s", error, extra={"reason": error.reason})
        progress.send_result({_camel(key): value for key, value in told(error).items()})
        return error.exit_code
    except Exception as error:
        if memory.ran_out(error):
            log.warning("out of memory: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return EXIT_OUT_OF_MEMORY
        log.exception("the %s stage failed in a way it does not know", document.stage)
        progress.send_result(
            {
                "reason": "InternalError",
                "message": f"{type(error).__name__}: {error}",
                "hint": "see the pod's log for the traceback",
            }
        )
        return 1
    progress.send_result(
        result.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"outcome", "exit_code"})
    )
    return 0


def _run(document: stage.PrepareStage | stage.TrainStage | stage.InferStage) -> stage.Result:
    # Each stage is imported when it runs: prepare and the error paths need no torch.
    if isinstance(document, stage.TrainStage):
        from kubepeft_jobs.train import published

        if found := published.find(document):
            return found
        with imports.quick():
            from kubepeft_jobs.train import stage as train
        return train.run(document)
    if isinstance(document, stage.PrepareStage):
        from kubepeft_jobs.prepare import stage as prepare

        signal.signal(signal.SIGTERM, _stop_at_once)
        return prepare.run(document)
    from kubepeft_jobs.infer import stage as infer

    return infer.run(document)


def _stop_at_once(*_: object) -> None:
    raise Saved("stopped; nothing to save, the next attempt starts over")


def _die_with_supervisor() -> None:
    """End at once when the supervisor is gone: nobody would read the result, and the GPU is needed by the next attempt."""
    lifeline = os.environ.pop(stage.ENV_LIFELINE, None)
    if lifeline is None:
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(int(lifeline), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)


def _leave(exit_code: int) -> None:
    """Leave Python once what others registered for its end has run: taking down torch's modules takes another second or two."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    ending = [1]
    atexit.register(lambda: _leave(*ending))  # registered first, so called last
    ending[0] = main()
