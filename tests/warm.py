"""Starts `python launch.py ...` as a fork of a process that has imported everything.

Importing torch and diffusers takes longer than most of what the tests launch. A server, forked
from pytest before the first test, holds the imports. `start` asks it for a process with the given
arguments, folder, environment and pipes. That process becomes a child of pytest, so that Popen can
wait for it. What cogvx itself starts as a new Python (a run's ranks, a sweep's server) is forked
too. Tests of the start itself say `cold=True`; COGVX_TESTS_COLD=1 makes every start a real one.
"""

from __future__ import annotations

import _posixsubprocess
import atexit
import contextlib
import ctypes
import fcntl
import gc
import io
import itertools
import json
import logging
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path

from stand_in import reread_environment

PROJECT = Path(__file__).parent.parent
LAUNCH = str(PROJECT / "launch.py")
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: orphaned grandchildren become children
FORKED = ("-m cogvx.", "-c from multiprocessing.forkserver import main")
SENT = 1 << 18  # bytes of a request at most
server: socket.socket | None = None


def start(*arguments: object, cold: bool = False, **settings) -> subprocess.Popen:
    """Popen of `python launch.py ARGUMENTS`; `settings` are Popen's."""
    return python(LAUNCH, *arguments, cold=cold, **settings)


def python(*words: object, cold: bool = False, **settings) -> subprocess.Popen:
    """Popen of `python WORDS`: a file, `-m MODULE` or `-c CODE`, with arguments."""
    kind = subprocess.Popen if cold or server is None else Warm
    return kind([sys.executable, *map(str, words)], **settings)


def run(*arguments: object, cold: bool = False, **settings) -> subprocess.CompletedProcess:
    """`python launch.py ARGUMENTS` to its end, with its output as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start(*arguments, cold=cold, **pipes, **settings) as process:
        try:
            said = process.communicate(timeout=240)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def serve() -> None:
    """Imports what a run needs and forks the server. Called once, before the first test."""
    global server
    import cogvx.runs.preloaded  # noqa: F401

    gc.collect()
    gc.freeze()  # collections leave out what is imported; a run in pytest makes several
    if not sys.platform.startswith("linux") or os.environ.get("COGVX_TESTS_COLD") == "1":
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            answer(theirs)
        finally:
            os._exit(0)
    theirs.close()
    server = ours


class Warm(subprocess.Popen):
    """A process that the server forks."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        assert preexec_fn is None and not pass_fds, "the server cannot pass these on"
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = others[:9]
        wanted = {
            "arguments": args[1:],
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": others[14],
        }
        pipes = (p2cread, c2pwrite, errwrite)
        streams = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        with as_subreaper():
            socket.send_fds(server, [json.dumps(wanted).encode()], streams)
            self.pid = int(server.recv(64))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


@contextlib.contextmanager
def as_subreaper():
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(SUBREAPER, 0, 0, 0, 0)


# -- in the server -------------------------------------------------------------------------------


def answer(channel: socket.socket) -> None:
    """Forks a process for every request, until pytest has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    close_all_but(channel.fileno())
    while True:
        request, streams, _, _ = socket.recv_fds(channel, SENT, 3)
        if not request:
            return
        number = fork_orphan(json.loads(request), streams)
        for stream in streams:
            os.close(stream)
        channel.send(str(number).encode())


def fork_orphan(wanted: dict, streams: list[int]) -> int:
    """The number of a new process whose parent has ended: the subreaper's."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        number = os.fork()
        if number == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become(**wanted, streams=streams)
        os.write(write, str(number).encode())
        os._exit(0)
    os.waitpid(between, 0)
    number = int(os.read(read, 64))
    os.close(read)
    os.close(write)
    return number


# -- in a forked process -------------------------------------------------------------------------


def become(
    arguments: list[str],
    cwd: str | None,
    env: dict[str, str] | None,
    new_session: bool,
    streams: list[int],
    kept: tuple[int, ...] = (),
) -> None:
    """Makes this fork what `python ARGUMENTS` would be, runs it and ends."""
    code = 1
    try:
        take_streams(streams, kept)
        if cwd is not None:
            os.chdir(cwd)
        if new_session:
            os.setsid()
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if "HF_ENDPOINT" in os.environ:
            reread_environment()
        forget_the_parent()
        code = exit_code_of(arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def take_streams(streams: list[int], kept: tuple[int, ...]) -> None:
    """Puts `streams` in the place of descriptors 0, 1 and 2; -1 leaves one as it is."""
    copies = [fd if fd == -1 else fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in streams]
    for number, copy in enumerate(copies):
        if copy != -1:
            os.dup2(copy, number)
    close_all_but(*kept)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(
        io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8"
    )
    sys.stdout = sys.__stdout__ = text_to(1, errors="strict")
    sys.stderr = sys.__stderr__ = text_to(2, errors="backslashreplace", line_buffering=True)
    # pytest's handlers write to a descriptor that is closed here: soon it is another file's.
    logging.root.handlers.clear()
    # Handlers of the parent's libraries write to a stream that pytest may have closed.
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", []):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr


def text_to(descriptor: int, **how) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", **how)


def close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def forget_the_parent() -> None:
    """Undoes what a new Python would not have: handlers of signals, multiprocessing's servers."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.forkserver._forkserver.__init__()
    multiprocessing.resource_tracker._resource_tracker.__init__()
    for module in (subprocess, _posixsubprocess):
        name = "_fork_exec" if module is subprocess else "fork_exec"
        setattr(module, name, fork_or_execute)


def exit_code_of(arguments: list[str]) -> int:
    try:
        run_as_main(arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def run_as_main(arguments: list[str]) -> None:
    """As Python's own command line: a file, `-m MODULE` or `-c CODE`."""
    how, *others = arguments
    sys.argv = ["-c" if how == "-c" else how, *others]
    if how == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = others
        sys.modules.pop(others[0], None)  # else runpy warns that it is imported already
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *others[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(others[0], vars(main))
    else:
        sys.path.insert(0, os.path.dirname(how))
        runpy.run_path(how, run_name="__main__")


executed = _posixsubprocess.fork_exec


def fork_or_execute(args, executables, close_fds, kept, cwd, env, *others):
    """In place of fork_exec: a Python that would import everything again is a fork."""
    words = [os.fsdecode(word) for word in args]
    # multiprocessing passes on Python's own options, such as -B.
    asked = list(itertools.dropwhile(lambda word: word not in ("-c", "-m"), words))
    if words[0] != sys.executable or not " ".join([*asked, ""]).startswith(FORKED):
        return executed(args, executables, close_fds, kept, cwd, env, *others)
    number = os.fork()
    if number:
        return number
    pairs = None if env is None else (os.fsdecode(each).split("=", 1) for each in env)
    become(
        asked,
        None if cwd is None else os.fsdecode(cwd),
        None if pairs is None else dict(pairs),
        bool(others[9]),
        [others[0], others[3], others[5]],
        tuple(set(kept) - {others[7]}),  # Popen waits until this one is closed
    )
