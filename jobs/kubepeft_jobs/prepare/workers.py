"""A pool of worker processes that answer in order, with a bounded number of chunks under way.

Each worker is its own program on two pipes, so it starts clean (no forked threads), ends when this process does, however it ends,
and its death is the end of a pipe: an error at once, never a wait. Nothing here knows what the chunks mean.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from kubepeft.errors import TransientError, UserError

from .read import Chunk
from .worker import ChunkResult, Refusal, Setup, TokenizerFacts, WorkerFailure


class WorkerPool:
    """`with WorkerPool(4) as pool: pool.load(setup); for chunk, result in pool.map(chunks, False): …`

    The processes begin with their imports, which take seconds, as soon as the pool is entered. Raises what a worker raised, and
    TransientError WorkerDied when one was killed.
    """

    def __init__(self, count: int, *, trust_remote_code: bool = False) -> None:
        self._count, self._trust_remote_code = count, trust_remote_code
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="prepare")

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }
        program = (
            f"from kubepeft_jobs.prepare.worker import main; main(trust_remote_code={self._trust_remote_code is True})"
        )
        try:
            for _ in range(self._count):
                process = subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
                self._processes.append(process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def load(self, setup: Setup) -> TokenizerFacts:
        """Have every worker load the tokenizer; once, and before `map`."""
        loading = [self._threads.submit(_ask, process, setup, "") for process in self._processes]
        facts: list[TokenizerFacts] = [future.result() for future in loading]
        for process in self._processes:
            self._idle.put(process)
        return facts[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)

    def map(self, chunks: Iterable[Chunk], samples_from_first: bool) -> Iterator[tuple[Chunk, ChunkResult]]:
        """Results in the order of the chunks; at most two chunks a worker are under way."""
        pending: deque[tuple[Chunk, Future[Any]]] = deque()
        for number, chunk in enumerate(chunks):
            pending.append((chunk, self._threads.submit(self._encode, chunk, samples_from_first and number == 0)))
            if len(pending) >= 2 * self._count:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        while pending:
            chunk, future = pending.popleft()
            yield chunk, future.result()

    def _encode(self, chunk: Chunk, want_samples: bool) -> Any:
        process = self._idle.get()
        try:
            return _ask(process, (chunk, want_samples), chunk.name)
        finally:
            self._idle.put(process)


def _close(pipe: Any) -> None:
    with suppress(BrokenPipeError):  # what was still buffered for a worker that is gone
        pipe.close()


def _ask(process: subprocess.Popen[bytes], request: object, where: str) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(request, process.stdin, protocol=5)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise TransientError(
            "WorkerDied",
            f"a worker process {how} in the middle of its work",
            where=where,
            mend="signal 9 is most often too little memory: raise the memory limit, or give fewer CPUs (one worker each)",
        ) from None
    if isinstance(answer, Refusal):
        raise UserError(answer.reason, answer.what, where=answer.where, mend=answer.mend)
    if isinstance(answer, WorkerFailure):
        raise RuntimeError(f"a worker failed:\n{answer.text}")
    return answer
