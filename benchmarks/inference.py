"""Clips per second by batch size, and where the time goes: a table, no test.

Every row is measured in a process of its own, on distinct copies of the bundled clip, with untrained weights (which
cost what trained ones cost). Reading media runs ahead in worker threads, as in inference.py. Beside each part stands
how many times its floor it takes; the floor is what the part must compute or read, at the best rate that one plain
matrix product reached in the same run.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# torch and the package are imported where they are used: in the measuring process, whose peak memory they belong to.

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "assets" / "example.mp4"


@dataclass(frozen=True)
class Rates:
    """What this machine reaches: operations and bytes a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """What one process measured; encode, prefill and step are for a whole batch; times are seconds."""

    batch: int
    new_tokens: int
    clips_per_second: float
    load: float
    media: float  # one clip in one thread
    encode: float  # SigLIP, Whisper, BERT
    prefill: float  # projectors, and the prompt through the language model
    step: float  # one more token for every clip of the batch
    encode_operations: int
    prefill_operations: int
    step_operations: int
    step_bytes: int
    peak_bytes: int
    rates: Rates

    def floors(self, rates: Rates) -> tuple[float, float, float]:
        """Seconds that encode, prefill and step take at least."""
        step = max(self.step_operations / rates.flops, self.step_bytes / rates.bytes)
        return self.encode_operations / rates.flops, self.prefill_operations / rates.flops, step

    def clip_floor(self, rates: Rates) -> float:
        """Seconds a clip takes at least, media not counted."""
        encode, prefill, step = self.floors(rates)
        return (encode + prefill + (self.new_tokens - 1) * step) / self.batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1], allow_abbrev=False
    )
    parser.add_argument("--geometry", nargs="+", choices=("tiny", "medium"), default=["tiny", "medium"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16], help="default: 1 4 8 16")
    parser.add_argument("--new_tokens", type=int, default=64, help="each answer's exact length (default: 64)")
    parser.add_argument("--clips", type=int, default=32, help="clips a row (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    options = parser.parse_args()
    if min(options.clips, *options.batch) < 1 or options.new_tokens < 2:
        parser.error("--batch and --clips are at least 1, --new_tokens at least 2")
    print(describe_machine(options))
    for geometry in options.geometry:
        folder = checkpoint(geometry)
        rows = []
        for batch in options.batch:
            print(f"measuring {geometry}, batch {batch} ...", file=sys.stderr, flush=True)
            rows.append(in_new_process(folder, batch, options.new_tokens, options.clips, options.dtype))
        rates = Rates(max(row.rates.flops for row in rows), max(row.rates.bytes for row in rows))
        print(f"\n{geometry}: {rates.flops / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.1f} GB/s in plain products\n")
        print(table(rows, rates, options.markdown), flush=True)


def describe_machine(options: argparse.Namespace) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, load before the run {load}; {options.dtype}, "
        f"{options.new_tokens} new tokens, {options.clips} clips a row"
    )


def checkpoint(geometry: str) -> Path:
    """The folder of the untrained checkpoint, built on first use."""
    folder = REPOSITORY / "models" / f"{geometry}-untrained"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "humanomni.tiny", folder, "--geometry", geometry], check=True)
    return folder


def in_new_process(*arguments) -> Row:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def measure(folder: Path, batch: int, new_tokens: int, clips: int, dtype: str) -> Row:
    """One row of the table."""
    import torch
    import transformers

    import humanomni
    from humanomni.generation import Request, generate_many

    transformers.logging.disable_progress_bar()
    load, (model, processor) = timed(lambda: humanomni.load_pretrained(folder, dtype=dtype, device="cpu"))
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        paths = [shutil.copy(EXAMPLE, Path(temporary) / f"clip{n:03}.mp4") for n in range(clips)]
        processor.load_media(paths[0])  # the first call loads libraries
        media = min(timed(lambda path=path: processor.load_media(path))[0] for path in paths[:4])
        parts = measure_parts(model, processor, paths[:1] * batch, length)
        requests = [Request(path=str(path)) for path in paths]
        total, results = timed(lambda: list(generate_many(model, processor, requests, batch_size=batch, **length)))
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise RuntimeError(failed[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Row(batch, new_tokens, clips / total, load, media, **parts, peak_bytes=peak)


def measure_parts(model, processor, paths: list, length: dict) -> dict:
    """The fields of a row that concern one batch; times are the better of two runs."""
    from torch.utils.flop_counter import FlopCounterMode

    from humanomni.prompts import DEFAULT_INSTRUCT

    batch = processor(DEFAULT_INSTRUCT, paths)
    text = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    with FlopCounterMode(display=False) as encoding:
        features = model.model.encode(**batch)
    with FlopCounterMode(display=False) as filling:
        model(**text, **features, logits_to_keep=1)
    encode = min(timed(lambda: model.model.encode(**batch))[0] for _ in range(2))
    runs = [generation_times(model, {**text, **features}, length) for _ in range(2)]

    weights = sum(weight.numel() for weight in (*model.model.layers.parameters(), model.lm_head.weight))
    return {
        "encode": encode,
        "prefill": min(first for first, _ in runs),
        "step": min(step for _, step in runs),
        "encode_operations": encoding.get_total_flops(),
        "prefill_operations": filling.get_total_flops(),
        "step_operations": 2 * weights * len(paths),
        "step_bytes": weights * model.dtype.itemsize,
        "rates": machine_rates(model.dtype),
    }


def generation_times(model, inputs: dict, length: dict) -> tuple[float, float]:
    """Seconds to the first token of encoded clips, and from each token to the next (the median)."""
    from statistics import median

    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self):
            self.ticks = [time.perf_counter()]

        def __call__(self, input_ids, scores, **kwargs):
            self.ticks.append(time.perf_counter())
            return input_ids.new_zeros(len(input_ids), dtype=bool)

    clock = Clock()
    model.generate(**inputs, **length, do_sample=False, stopping_criteria=[clock])
    gaps = [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return gaps[0], median(gaps[1:])


def machine_rates(dtype) -> Rates:
    """Of a matrix product of a tower's size, and of a matrix too large for the caches times a vector."""
    import torch

    rows, weights, table = (torch.ones(shape, dtype=dtype) for shape in ((1568, 768), (768, 3072), (8192, 8192)))
    product = min(timed(lambda: rows @ weights)[0] for _ in range(20))
    vector = torch.ones(8192, dtype=dtype)
    reading = min(timed(lambda: table @ vector)[0] for _ in range(10))
    return Rates(2 * 1568 * 768 * 3072 / product, table.nbytes / reading)


def timed(action) -> tuple[float, object]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def table(rows: list[Row], rates: Rates, markdown: bool) -> str:
    """Parts in seconds a clip, with the multiple of their floors; `bound` is the gain that the floors alone allow."""
    heads = ["batch", "clips/s", "gain", "bound", "load", "media", "encode", "prefill", "step, ms", "peak, MB"]
    lines = [cells(row, rows[0], rates) for row in rows]
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---:"] * len(heads), *lines))
    widths = [max(len(line[column]) for line in (heads, *lines)) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *lines)
    )


def cells(row: Row, base: Row, rates: Rates) -> list[str]:
    """One line of the table; gains are over `base`."""
    encode, prefill, step = row.floors(rates)
    return [
        str(row.batch),
        f"{row.clips_per_second:.3f}",
        f"{row.clips_per_second / base.clips_per_second:.2f}x",
        f"{base.clip_floor(rates) / row.clip_floor(rates):.2f}x",
        f"{row.load:.1f}",
        f"{row.media:.3f}",
        f"{row.encode / row.batch:.3f} ({row.encode / encode:.1f}x)",
        f"{row.prefill / row.batch:.3f} ({row.prefill / prefill:.1f}x)",
        f"{row.step * 1e3:.1f} ({row.step / step:.1f}x)",
        f"{row.peak_bytes / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
