"""Runs commands that depend on each other, some at a time, and remembers which are finished."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIVE = ('Iter(train)', 'Iter(val)', 'Iter(test)')  # mmengine's lines that show progress


class StepError(RuntimeError):
    """A command failed; the message holds the end of its output."""


@dataclass
class Step:
    """One command.

    Args:
        name: What it does, in a word or two, unique.
        command: Program and arguments.
        needs: Names of the steps that must be finished before.
    """

    name: str
    command: list[str]
    needs: list[str]

    @property
    def slug(self) -> str:
        """The name, fit for a file."""
        return self.name.replace(' ', '_')


def run_steps(steps: list[Step], out: Path, fingerprint: str, jobs: int) -> dict[str, dict]:
    """Run what is not finished yet, each step as soon as what it needs is there.

    The record of a finished step, ``steps/<step>.json``, holds its command and times. It counts as
    long as its command, ``fingerprint`` and the runs of the steps before it are the same.

    Args:
        steps: In the order of urgency; each after the steps that it needs.
        out: Folder for ``steps/`` and ``logs/``.
        fingerprint: Changes when something has changed that no command shows.
        jobs: Steps at a time; each gets its share of the processor's threads.

    Returns:
        Name -> record, of every step, in the order of ``steps``.

    Raises:
        StepError: A command failed. The others are stopped.
    """
    for name in ('logs', 'steps'):
        (out / name).mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = {'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads, **os.environ}
    records, running, waiting = {}, [], list(steps)
    try:
        while waiting or running:
            for step in list(waiting):
                if len(running) == jobs or not all(name in records for name in step.needs):
                    continue
                waiting.remove(step)
                started = {name: records[name]['started'] for name in step.needs}
                job = Job(step, out, dict(fingerprint=fingerprint, needs=started))
                if job.is_finished():
                    records[step.name] = job.record
                else:
                    job.start(env)
                    running.append(job)
            time.sleep(0.05)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                records[job.step.name] = job.finish()
    finally:
        for job in running:
            job.stop()
    return {step.name: records[step.name] for step in steps}


class Job:
    """A step on its way: its process, its log and its record."""

    def __init__(self, step: Step, out: Path, state: dict) -> None:
        self.step = step
        self.identity = dict(command=step.command, **state)
        self.record = None
        self.log = out / 'logs' / f'{step.slug}.log'
        self.file = out / 'steps' / f'{step.slug}.json'

    def is_finished(self) -> bool:
        """Whether the step's record is there and counts; a damaged one does not."""
        try:
            self.record = dict(json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            return False
        if not all(
            isinstance(self.record.get(key), (int, float)) for key in ('seconds', 'started')
        ):
            return False
        same = all(self.record.get(key) == value for key, value in self.identity.items())
        if same:
            print(f'[{self.step.name}] finished before, in {self.record["seconds"]:.0f} s')
        return same

    def start(self, env: dict[str, str]) -> None:
        """Start the process, and a thread that reads what it says."""
        print(f'[{self.step.name}] {shown(self.step.command)}', flush=True)
        self.file.unlink(missing_ok=True)
        self.started = time.time()
        self.process = subprocess.Popen(
            self.step.command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            preexec_fn=_die_with_parent if LIBC else None,
        )
        self.reader = threading.Thread(target=self._follow)
        self.reader.start()

    def _follow(self) -> None:
        """Copy the output to the log, and what shows progress to the screen."""
        with self.log.open('w') as log:
            for line in self.process.stdout:
                log.write(line)
                if any(word in line for word in LIVE):
                    print(f'[{self.step.name}] {line.split(" - ")[-1].rstrip()}', flush=True)

    def finish(self) -> dict:
        """File the ended process and return its record."""
        self.reader.join()
        seconds = time.time() - self.started
        if self.process.returncode:
            with self.log.open(errors='replace') as log:
                tail = ''.join(deque(log, maxlen=30))
            raise StepError(
                f'Step `{self.step.name}` failed with exit status {self.process.returncode}:\n'
                f'  {shown(self.step.command)}\nThe end of {self.log}:\n{tail}'
            )
        self.record = dict(self.identity, started=self.started, seconds=seconds)
        part = self.file.with_suffix('.part')
        part.write_text(json.dumps(self.record, indent=2) + '\n')
        part.replace(self.file)
        print(f'[{self.step.name}] finished in {seconds:.0f} s', flush=True)
        return self.record

    def stop(self) -> None:
        """End the process early."""
        self.process.terminate()
        self.process.wait()
        self.reader.join()


def _die_with_parent() -> None:
    """Let the system end this process when the one that started it ends, even if it is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def shown(command: list[str]) -> str:
    """A command as one would type it."""
    program = 'python' if command[0] == sys.executable else command[0]
    return shlex.join([program, *command[1:]])
