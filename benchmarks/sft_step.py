"""Seconds and peak memory of one SFT step, from raw clips and from cached features, and where the time goes.

    python benchmarks/sft_step.py [--geometry medium] [--steps 4] [--repeats 3] [--batch_size 2]

Runs the real entry point, `open_r1.sft`, on an untrained model. Each run is a process of its own, so that its peak
memory is its own, and the two variants take turns, so that what else the machine does hits both. The first step of a
run is left out. Prints Markdown.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "assets" / "example.mp4"
VARIANTS = ("raw clips", "cached features")
QUESTION = "<video>\n<audio>\nWhich emotion conveyed by the characters is the most obvious to you?"
REASONING = "The woman in the video smiles, her eyes are bright and her voice is warm and lively. " * 4
PARTS = {
    "vision tower": "vision_tower",
    "audio tower": "audio_tower",
    "BERT": "bert_model",
    "video projector": "mm_projector",
    "audio projector": "audio_projector",
    "gate": "bert_gate",
}
PHASES = ("read clips or features", *PARTS, "language model, forward", "backward", "optimiser")


def main() -> None:
    """Makes the model, the clips and the cache, lets the variants take turns and prints the comparison."""
    args = parse_arguments()
    if args.record:
        run_and_record(Path(args.record), args.entry_arguments)
        return
    with tempfile.TemporaryDirectory(prefix="sft-step-") as folder:
        folder = Path(folder)
        prepare(folder, args)
        runs = {variant: [] for variant in VARIANTS}
        for repeat in range(args.repeats):
            for variant in VARIANTS:
                print(f"repeat {repeat + 1} of {args.repeats}: {variant}", file=sys.stderr)
                runs[variant].append(train(folder, variant, args))
    print(report(runs, args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="medium", help="of humanomni.tiny (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="clips a step (default: %(default)s)")
    parser.add_argument("--record", help=argparse.SUPPRESS)  # a run's own process: where its figures go
    parser.add_argument("entry_arguments", nargs="*", help="further options of open_r1.sft, after --")
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Writes the model, one clip for each row of a run, their list and their cache into `folder`."""
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "humanomni.tiny", folder / "model", "--geometry", args.geometry], check=True, stdout=sys.stderr
    )
    (folder / "clips").mkdir()
    samples = []
    for index in range((args.steps + 1) * args.batch_size):
        shutil.copyfile(EXAMPLE, folder / "clips" / f"{index}.mp4")
        answer = f"<think>{REASONING}</think>\n<answer>happy</answer>"
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]
        samples.append({"video": f"{index}.mp4", "conversations": turns})
    (folder / "list.json").write_text(json.dumps(samples))
    options = ["--model_path", folder / "model", "--data", folder / "list.json", "--data_folder", folder / "clips"]
    done = subprocess.run(
        [*python, "open_r1.cache_features", *options, "--out", folder / "cache"], check=True, capture_output=True
    )
    print(f"cache: {done.stdout.decode().strip()}", file=sys.stderr)


def train(folder: Path, variant: str, args: argparse.Namespace) -> dict:
    """One run in a process of its own; returns what `run_and_record` wrote."""
    options = {
        "--model_path": folder / "model",
        "--data": folder / "list.json",
        "--data_folder": folder / "clips",
        "--output_dir": folder / "output",
        "--max_steps": args.steps + 1,
        "--per_device_train_batch_size": args.batch_size,
        "--max_length": 4096,
        "--bf16": False,
        "--gradient_checkpointing": False,
        "--save_strategy": "no",
        "--report_to": "none",
        "--dataloader_num_workers": 0,  # reading is a phase of its own here
    }
    if variant == "cached features":
        options["--feature_cache"] = folder / "cache"
    command = [sys.executable, __file__, "--record", folder / "record.json", "--", *args.entry_arguments]
    command += [part for option in options.items() for part in option]
    shutil.rmtree(folder / "output", ignore_errors=True)
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "record.json").read_text())


def run_and_record(record: Path, arguments: list[str]) -> None:
    """Trains through the entry point with a clock at the borders of its phases."""
    import torch

    from open_r1 import sft

    if not torch.cuda.is_available():
        arguments = [*arguments, "--use_cpu", "True"]
    clock = StepClock()
    clock.attach()
    sft.main(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    record.write_text(json.dumps({"steps": clock.steps[1:], "peak_memory": peak, "peak_gpu_memory": gpu}))


class StepClock:
    """Seconds of each phase of each step, taken by torch's global hooks from outside the code that trains."""

    def __init__(self):
        self.steps: list[dict] = []
        self.phases: dict[str, float] = defaultdict(float)
        self.last, self.last_cpu = time.perf_counter(), time.process_time()
        self.attached = False

    def attach(self) -> None:
        from torch.nn.modules import module
        from torch.optim import optimizer

        module.register_module_forward_pre_hook(self.on_model)
        optimizer.register_optimizer_step_pre_hook(lambda *_: self.mark("backward"))
        optimizer.register_optimizer_step_post_hook(self.on_step)

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on `phase`."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase] += now - self.last
        self.last = now

    def on_model(self, module, inputs) -> None:
        from humanomni import HumanOmniQwen2ForCausalLM

        if not isinstance(module, HumanOmniQwen2ForCausalLM):
            return
        self.mark(PHASES[0])
        if self.attached:
            return
        self.attached = True
        module.register_forward_hook(lambda *_: self.mark("language model, forward"))
        loaded = dict(module.model.named_children())  # without the towers, where training reads cached features
        for phase, name in PARTS.items():
            if name in loaded:
                part = loaded[name]
                part.register_forward_pre_hook(lambda *_: self.mark("language model, forward"))
                part.register_forward_hook(lambda *_, phase=phase: self.mark(phase))

    def on_step(self, *_) -> None:
        self.mark("optimiser")
        cpu = time.process_time()
        self.steps.append(
            {"phases": dict(self.phases), "seconds": sum(self.phases.values()), "cpu": cpu - self.last_cpu}
        )
        self.last_cpu = cpu
        self.phases.clear()


def report(runs: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """Markdown: step time and memory of the variants, their ratio, and the phases."""
    steps = {variant: [step for run in done for step in run["steps"]] for variant, done in runs.items()}
    lines = [
        f"{args.geometry} geometry; {args.batch_size} clip(s) a step; {os.cpu_count()} CPU cores; {args.repeats} runs "
        f"of {args.steps} steps each, taking turns.",
        "CPU seconds count all cores, threads that wait by spinning included.",
        "",
        "| | s/step, min | s/step, median | CPU s/step, median | peak memory (GB) | peak GPU memory (GB) |",
        "|---|---|---|---|---|---|",
    ]
    figures = {}
    for variant, taken in steps.items():
        seconds, cpu = ([step[key] for step in taken] for key in ("seconds", "cpu"))
        host, gpu = (max(run[key] for run in runs[variant]) / 1e9 for key in ("peak_memory", "peak_gpu_memory"))
        figures[variant] = (min(seconds), statistics.median(seconds), statistics.median(cpu), host, gpu)
        cells = " | ".join(f"{figure:.2f}" for figure in figures[variant])
        lines.append(f"| {variant} | {cells} |")
    ratios = [f"**{raw / cached:.2f}**" if cached else "" for raw, cached in zip(*figures.values(), strict=True)]
    lines += [f"| **ratio** | {' | '.join(ratios)} |", ""]
    lines += [f"| median seconds of | {' | '.join(VARIANTS)} |", "|---|---|---|"]
    for phase in PHASES:
        cells = [f"{statistics.median(s['phases'].get(phase, 0) for s in steps[variant]):.3f}" for variant in VARIANTS]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
