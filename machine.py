"""The machine under a run: which device and precision, how fast it is, what of a run survives a
power cut, and who else is told.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import itertools
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data


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
    card = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {name} ({why}; {card}), {dtype} ({reason}), adapters and optimizer in float32")
    return torch.device(name), getattr(torch, dtype)


def matmul_peak(device, dtype):
    """The most operations a second that a matrix product reaches here: what utilisation is a share
    of. Best of some sizes and tries, in `dtype`; takes a second.
    """
    best, sync = 0.0, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for n in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(6):
            sync()
            t0 = time.perf_counter()
            a @ a
            sync()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - t0))
    return best


def peak_memory(device):
    """GiB: the most that tensors took on the GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def versions(run):
    packages = "torch", "transformers", "tiktoken", "numpy"
    found = {p: importlib.metadata.version(p) for p in packages}
    card = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
    return found | {"python": platform.python_version(), "base": run.source,
                    "data": Path(run.ds.source).name,
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
        rate = {"titles_per_s": self.titles / s, "tokens_per_s": self.tokens / s,
                "flops_per_s": self.flops / s, "utilisation": self.flops / s / run.peak}
        run.log(event="speed", **rate, matmul_flops_per_s=run.peak)
        return (f"{self.steps} steps, median {1e3 * np.median(self.seconds):.0f} ms; "
                f"{rate['titles_per_s']:.0f} titles, {rate['tokens_per_s']:.0f} tokens a second; "
                f"{rate['flops_per_s'] / 1e12:.3g} TFLOP/s, {rate['utilisation']:.0%} of the "
                f"{run.peak / 1e12:.3g} that a {str(run.dtype)[6:]} matrix product reaches here; "
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
                for k, v in line.items():
                    if isinstance(v, int | float):
                        writer.add_scalar(f"{where}/{k}", v, line.get("it", n))
            return write
    except ImportError as e:
        raise data.InputError(f"--track={cfg.track}: {e}; pip install {cfg.track}") from None
    return lambda line: None
