"""Runs a recorded configuration: here, or as processes of its own.   [no torch until the task is]"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.runs import record, report

FAILED = 2  # exit code of what the user can mend; its message is printed


def run(folder: Path, *, isolated: bool) -> int:
    """Runs what folder/config.yaml says; returns the exit code. `isolated`: in a process of its own, as jobs of a sweep are."""
    processes = configuration.read(folder / record.CONFIG).parallel.num_processes
    if processes == 1 and not isolated:
        return run_here(folder)
    worker = ["-m", "cogvx.runs.processes", str(folder)]
    if processes > 1:
        worker = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *worker]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(record.PROJECT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *worker], env=environment).returncode


def run_here(folder: Path) -> int:
    """The task, in this process; on a user's mistake its message, and 2. summary.json is written last, whatever happens."""
    main_process = os.environ.get("RANK", "0") == "0"
    config = configuration.read(folder / record.CONFIG)
    summary, code = {"status": "failed", "reason": "ended without a word"}, 1
    try:
        summary, code = config.task.run(config, folder), 0
        if summary["status"] == "interrupted":
            code = 128 + summary["signal"]
    except UserError as error:
        summary, code = {"status": "failed", "reason": str(error)}, FAILED
        if main_process:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        summary, code = {"status": "interrupted", "reason": "Ctrl-C"}, 130
        if main_process:
            print(
                "\nstopped by Ctrl-C; clips and prompts encoded so far stay in the cache", file=sys.stderr, flush=True
            )
    except BaseException as error:
        summary = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        if main_process:
            record.finish(folder, summary)
    if main_process and summary["status"] == "done":
        print(f"report  {record.shown(report.write(folder))}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(run_here(Path(sys.argv[1])))
