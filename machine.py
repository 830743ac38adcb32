"""The machine under a run: which device and precision, how fast it is, what of a run survives a
power cut, and who else is told.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data

# MKL chooses the kernel of each vector function in its first call of a process. Made by several
# threads at once, that call can be good to 1.5e-4 only in one of them (pytorch issue 188792), and
# a resumed run differ from the one it continues; so one thread makes it here.
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
    function(torch.ones(1))


def choose_device(cfg):
    """-> (torch.device, dtype of base and activations); prints both and why."""
    name, why = cfg.device, "asked for"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "a GPU is here" if name == "cuda" else "no GPU is here"
    if name == "cuda" and not torch.cuda.is_available():
        raise data.InputError("--device=cuda: torch sees no GPU here; --device=cpu, or install a "
                              "torch with CUDA")
    if name == "mps" and not torch.backends.mps.is_available():
        raise data.InputError("--device=mps: torch sees no Apple GPU here; use --device=cpu")
    dtype, reason = cfg.dtype, "asked for"
    if dtype == "auto":
        if name != "cuda":
            dtype, reason = "float32", "not a CUDA device"
        elif torch.cuda.get_device_capability()[0] >= 8:
            dtype, reason = "bfloat16", "the GPU computes in it"
        else:
            dtype, reason = "float16", "the GPU has no bfloat16; gradients are scaled"
    if name == "cuda":
        # its backward pass under a mask can be NaN (pytorch issue 196678), and it plans every new
        # shape anew; the flash and memory-efficient kernels do neither
        torch.backends.cuda.enable_cudnn_sdp(False)
    card = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {name} ({why}; {card}), {dtype} ({reason}), adapters and optimizer in float32")
    if name == "cpu" and dtype != "float32":
        a = torch.ones(256, 256)
        low = a.to(getattr(torch, dtype))
        plain, own = map(min, in_turns(torch.device("cpu"), 3, lambda: a @ a, lambda: low @ low))
        if own > 2 * plain:
            print(f"! this CPU multiplies {own / plain:.0f} times slower in {dtype} than in float32: "
                  f"use --dtype=float32")
    return torch.device(name), getattr(torch, dtype)


def has_compiler():
    """Whether there is a C compiler, which torch.compile needs; says so if not."""
    found = any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    if not found:
        print("! no C compiler: nothing is compiled; install gcc for a faster run")
    return found


def in_turns(device, repeats, *sides):
    """Seconds of every side, run one after the other `repeats` times, after one run of each."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = [[] for _ in sides]
    for r in range(repeats + 1):
        for side, times in zip(sides, seconds):
            sync()
            t0 = time.perf_counter()
            side()
            sync()
            times.append(time.perf_counter() - t0)
    return [times[1:] for times in seconds]


def matmul_peak(device, dtype):
    """The most operations a second that a matrix product reaches here: what utilisation is a share
    of. Best of some sizes and tries, in `dtype`; takes a second. Draws from no shared generator.
    """
    own = torch.Generator(device).manual_seed(0)
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(n, n, device=device, generator=own).to(dtype)
        seconds, = in_turns(device, 5, lambda: a @ a)
        best = max(best, 2 * n ** 3 / min(seconds))
    return best


def peak_memory(device):
    """GiB: the most that tensors took on the GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def versions(run):
    """What a result depends on beside its options: packages, base model, data, device."""
    packages = "torch", "transformers", "tiktoken", "numpy"
    found = {p: importlib.metadata.version(p) for p in packages}
    card = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
    base, *what = run.made_of()
    return found | {"python": platform.python_version(), "base": base, "data": ", ".join(what),
                    "device": f"{run.device.type} {card}", "dtype": str(run.dtype)[6:]}


# ---------------------------------------------------------------------- checkpoints

def write_checkpoint(folder, content, stem="checkpoint"):
    """folder/checkpoint.pt: a SHA-256 and a torch file. Written beside and renamed, after the one
    before it was renamed to checkpoint.previous.pt: killed at any moment, a whole one is there.
    Returns whether it could be written.
    """
    body = io.BytesIO()
    torch.save(content, body)
    new, now, old = (folder / f"{stem}{x}.pt" for x in (".new", "", ".previous"))
    try:
        with open(new, "wb") as f:
            f.write(hashlib.sha256(body.getbuffer()).digest())
            f.write(body.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        if now.exists():
            os.replace(now, old)
        os.replace(new, now)
    except OSError as e:
        new.unlink(missing_ok=True)
        print(f"!! {now} could not be written ({e.strerror}); the one before it is whole",
              flush=True)
        return False
    return True


def read_checkpoint(folder, stem="checkpoint"):
    """The latest whole checkpoint of a folder, or None. One that is damaged is named."""
    for path in (folder / f"{stem}.pt", folder / f"{stem}.previous.pt"):
        if path.exists():
            raw = path.read_bytes()
            if hashlib.sha256(raw[32:]).digest() == raw[:32]:
                return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
            print(f"!! {path} is damaged; going back to the one before it", flush=True)
    return None


class Stopped(Exception):
    """Ctrl-C: the run has saved itself."""


class Resumable:
    """A run that may be stopped at any moment and then goes on as if it never had been: its folder,
    its log, its checkpoints, Ctrl-C.

    A subclass has `cfg`, `device` and `start`, a time; `state`, plain numbers, lists and tensors
    that say how far it is (the "stage", and "it", its steps made); `opt` and `scaler`; and
    weights() and made_of(): what of it is to be saved, and on what it was begun.
    """

    def open(self, out):
        """Make the folder `out` ready. -> the checkpoint to go on from, or None. InputError where
        it cannot be written, another run is at work there or left an unfinished one.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.log_file = open(out / "log.jsonl", "a+")
            try:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise data.InputError(f"{out}: another run is at work there; wait for its end, or "
                                      f"use another --out_dir") from None
            except OSError:                 # a file system without locks
                pass
            checkpoint = read_checkpoint(out)
            if checkpoint and not self.cfg.resume:
                raise data.InputError(f"{out} holds an unfinished run: --resume goes on with it; "
                                      f"or delete its checkpoint*.pt, or use another --out_dir")
            if not checkpoint:
                if (out / "results.json").exists():
                    raise data.InputError(f"{out} holds a finished run: use another --out_dir, or "
                                          f"delete it")
                self.log_file.seek(0)           # or its place would stay behind the end
                self.log_file.truncate()
                (out / "sft.pt").unlink(missing_ok=True)    # another run's
        except OSError as e:
            raise data.InputError(f"--out_dir={out}: {e.strerror}; choose another") from None
        self.out, self.saved, self.stop = out, time.time(), False
        self.track = tracker(self.cfg)
        return checkpoint

    def save(self, stem="checkpoint"):
        """Write a checkpoint of all there is. -> whether that could be done."""
        self.state["minutes"] = self.minutes()
        cuda = {"cuda_rng": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {}
        done = write_checkpoint(self.out, self.weights() | cuda | {
            "config": dataclasses.asdict(self.cfg), "state": self.state, "made_of": self.made_of(),
            "optimizer": self.opt.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(), "log_size": self.log_file.tell()},
            stem)
        self.saved = time.time()
        return done

    def go_on(self, checkpoint):
        """torch's random state, the log and the clock as they were when `checkpoint` was saved."""
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda":
            if "cuda_rng" in checkpoint:            # not, if it was begun on a CPU
                torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        self.log_file.truncate(min(checkpoint["log_size"], self.log_file.seek(0, os.SEEK_END)))
        self.log_file.seek(0, os.SEEK_END)
        self.start = time.time() - 60 * self.state["minutes"]
        print(f"going on from {self.where()}, minute {self.state['minutes']:.1f}")

    @contextlib.contextmanager
    def working(self):
        """Ctrl-C asks to stop where the state is whole (`breathe`); a second one stops at once."""
        def ask_to_stop(*_):
            self.stop = True
            signal.signal(signal.SIGINT, before)
        before = signal.signal(signal.SIGINT, ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.log_file.close()

    def breathe(self):
        """Called wherever the state is whole: saves now and then, and stops if Ctrl-C was hit."""
        due = self.stop or time.time() - self.saved >= self.cfg.save_every
        saved = due and self.save()
        if self.stop:
            raise Stopped(f"stopped and saved; to go on: python {sys.argv[0]} --resume "
                          f"--out_dir={self.cfg.out_dir}" if saved else "stopped, NOT saved")

    def watched(self, loop, name):
        """A loop with a bar, whose state is whole before every turn."""
        for x in tqdm(loop, name, leave=False, disable=None):
            self.breathe()
            yield x

    def steps(self, name, total):
        """The steps of a stage that are still to be made, with a bar."""
        self.bar = tqdm(range(self.state["it"], total), name, total=total, leave=False,
                        initial=self.state["it"], disable=None)
        for it in self.bar:
            self.breathe()
            yield it
            self.state["it"] = it + 1

    def where(self):
        """How far the run is, in words."""
        s = self.state
        game = f", round {s['round']}" if s["stage"] == "game" else ""
        return f"{s['stage']}{game}, step {s['it']}"

    def minutes(self):
        return (time.time() - self.start) / 60

    def log(self, **line):
        """A line of log.jsonl. A full disk costs the line, not the run."""
        self.track(line)
        try:
            self.log_file.write(json.dumps(line | {"minutes": round(self.minutes(), 3)}) + "\n")
            self.log_file.flush()
        except OSError as e:
            print(f"!! {self.out}/log.jsonl: {e.strerror}; a line was lost", flush=True)


# ---------------------------------------------------------------------- speed, and other logs

class Speed:
    """How fast SFT trained: windows, titles predicted, tokens (padding not counted) a second, and
    the share of the machine's own matrix product that this is.
    """

    def __init__(self, run):
        self.run, self.seconds, self.steps = run, [], 0
        self.titles = self.tokens = self.flops = 0

    def begin(self):
        self.start = time.perf_counter()

    def end(self, model, windows, choices):
        if self.steps >= 3:                                 # the first steps compile and warm up
            self.seconds.append(time.perf_counter() - self.start)
            size = [len(self.run.catalog.header) + self.run.catalog.lengths[w].sum()
                    for w in windows]
            self.titles += sum(len(w) - 1 for w in windows)
            self.tokens += sum(size)
            self.flops += model.flops(sum(size), np.dot(size, size) / sum(size) / 2,
                                      choices * len(self.run.catalog.trie.vocab))
        self.steps += 1

    def report(self):
        if not self.seconds:
            return f"{self.steps} steps, too few to time"
        s, run = sum(self.seconds), self.run
        peak = matmul_peak(run.device, run.dtype)
        rate = {"titles_per_s": self.titles / s, "tokens_per_s": self.tokens / s,
                "flops_per_s": self.flops / s, "utilisation": self.flops / s / peak}
        run.log(event="speed", **rate, matmul_flops_per_s=peak)
        return (f"{self.steps} steps, median {1e3 * np.median(self.seconds):.0f} ms; "
                f"{rate['titles_per_s']:.0f} titles, {rate['tokens_per_s']:.0f} tokens a second; "
                f"{rate['flops_per_s'] / 1e12:.3g} TFLOP/s, {rate['utilisation']:.0%} of the "
                f"{peak / 1e12:.3g} that a {str(run.dtype)[6:]} matrix product reaches here; "
                f"at most {peak_memory(run.device):.1f} GiB")


def tracker(cfg):
    """-> a function of a log line, which hands its numbers on to the service asked for."""
    try:
        if cfg.track == "wandb":
            import wandb
            return wandb.init(project="nanoUFO", config=dataclasses.asdict(cfg),
                              dir=cfg.out_dir).log
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer, count = SummaryWriter(cfg.out_dir), itertools.count()

            def write(line):
                n, where = next(count), "-".join(line[k] for k in ("event", "split") if k in line)
                n = n if "round" in line else line.get("it", n)     # "it" starts anew every round
                for k, v in line.items():
                    if isinstance(v, int | float):
                        writer.add_scalar(f"{where}/{k}", v, n)
            return write
    except ImportError as e:
        raise data.InputError(f"--track={cfg.track}: {e}; pip install {cfg.track}") from None
    return lambda line: None
