"""``hf-bucket predict`` on long and broken streams: memory, an interrupt, a reader that goes away."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_bucket.cli import main
from hf_bucket.predict import LineWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and resizes pipes"),
]

# A process that is started in the background of a script ignores SIGINT, and so would the children of these tests.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hf_bucket.cli import run
run()
"""
MEASURED = """
import sys
from hf_bucket.cli import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "model"
    assert main(["compile", str(tiny_bert), "--buckets", "8", "--batch-sizes", "1,32", "--output", str(folder)]) == 0
    return folder


def start(artifact: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start ``predict`` from standard input to standard output, with windows of 16 rows."""
    command = [sys.executable, "-c", RUN, "predict", str(artifact), "--kind", "text", "--window", "16", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


def feed(process: subprocess.Popen[bytes]) -> threading.Thread:
    """Write lines to a process until it reads no more."""

    def write() -> None:
        assert process.stdin is not None
        try:
            while True:
                process.stdin.write(b"w1 w2 w3\n" * 64)
        except OSError:
            pass  # it has ended

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def peak_bytes(artifact: Path, rows: int, folder: Path) -> int:
    source, target = folder / f"{rows}.txt", folder / f"{rows}.jsonl"
    source.write_text("".join(f"w{n % 90} w{n % 7}\n" for n in range(rows)), encoding="utf-8")
    options = ["predict", str(artifact), "--input", str(source), "--output", str(target)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *options], capture_output=True, text=True, check=True)
    with target.open(encoding="utf-8") as lines:
        assert sum(1 for _ in lines) == rows
    return int(done.stdout)


def test_100_000_lines_take_less_than_200_mb_above_the_loaded_model(artifact: Path, tmp_path: Path) -> None:
    assert peak_bytes(artifact, 100_000, tmp_path) - peak_bytes(artifact, 1, tmp_path) < 200e6


def test_an_interrupt_leaves_complete_lines_only(artifact: Path) -> None:
    with start(artifact) as process:
        writer = feed(process)
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()  # what it still wrote, until it ended
        errors = process.stderr.read().decode()
        writer.join()
    assert (process.returncode, rest[-1:] in (b"", b"\n")) == (1, True)
    assert all({"text", "label", "score"} == json.loads(line).keys() for line in (first + rest).splitlines())
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_with_status_1_and_no_traceback(artifact: Path) -> None:
    with start(artifact) as process:
        writer = feed(process)
        lines = [process.stdout.readline() for _ in range(3)]
        process.stdout.close()
        errors = process.stderr.read().decode()
        writer.join()
    assert process.returncode == 1
    assert all(json.loads(line)["text"] == "w1 w2 w3" for line in lines)
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_the_line_that_is_being_written_is_finished_before_the_interrupt() -> None:
    text = "".join(f"{number:099d}\n" for number in range(5_000))
    usual = signal.getsignal(signal.SIGINT)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    read: list[bytes] = []

    def interrupt_and_read() -> None:
        read.append(os.read(reading, 10))  # now the writer is in the middle, and soon the pipe is full
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while block := os.read(reading, 1 << 16):
            read.append(block)

    reader = threading.Thread(target=interrupt_and_read)
    with LineWriter(Path(f"/dev/fd/{writing}")) as lines:
        os.close(writing)
        reader.start()
        with pytest.raises(KeyboardInterrupt):
            lines.write(text)
    reader.join()
    os.close(reading)
    written = b"".join(read).decode()
    assert text.startswith(written)
    assert written.endswith("\n")
    assert len(written) < len(text)
    assert signal.getsignal(signal.SIGINT) is usual
