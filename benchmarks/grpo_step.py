"""One full GRPO step (rollout, scoring, backward): what each sharing saves, and how far the floor is.

    python benchmarks/grpo_step.py [--geometry medium] [--group 8] [--new_tokens 64] [--steps 1] [--repeats 1]

Each variant runs in a process of its own (peak memory is its own); the variants take turns. Loading is not measured,
nor is the first step, which warms up with everything shared: all variants go on from the same weights, and from a
policy that has left its reference. Seed and reward are the same too, hence the completions, the loss and its
gradients; only where rounding tips the draw of a token can they differ (the cache is float32, so that it rounds
nothing). The optimiser's time is a column of its own. A last step, not timed, counts the FLOPs that were really spent.

The floor is the work a step cannot avoid: each clip encoded once, each prompt through the projectors and the language
model once a pass, each completion once a pass, backward at twice forward. Each phase takes its FLOPs at the rate of a
plain matrix product, or its bytes at the rate of a plain sum, whichever is longer (bytes count for decoding alone:
every new token reads all weights and the cache). Both rates are medians over seconds of nothing else, before and after
the steps in the same process: what the machine sustains, as a step must, and not what it reaches in a lucky moment.
Weights are untrained, which costs what trained ones cost.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
# Large blocks stay with the process: fresh pages from the kernel cost more than what is computed in them.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
SWITCHES = ("encode_once", "project_once", "prefill_once", "share_prompt_cache", "decode_ahead")
VARIANTS = {
    "all off (as released)": (),
    "all on": SWITCHES,
    "all on, cached features": (*SWITCHES, "feature_cache"),
    "encode once": ("encode_once",),
    "project once": ("project_once",),
    "prefill once": ("prefill_once",),
    "share prompt cache (and project once)": ("project_once", "share_prompt_cache"),
    "decode ahead": ("decode_ahead",),
}


def main() -> None:
    args = parse_arguments()
    if args.worker is not None:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory(prefix="grpo-step-") as folder:
        prepare(Path(folder), args)
        runs = {name: [] for name in args.variants}
        for repeat in range(args.repeats):
            for name in args.variants:
                print(f"repeat {repeat + 1} of {args.repeats}: {name}", file=sys.stderr)
                runs[name].append(in_new_process(folder, name, args))
                print(row(name, runs[name], runs), file=sys.stderr)
    print(report(runs, args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="medium", help="of humanomni.tiny (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions of the one prompt (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens a completion (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="measured steps a process (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="processes a variant (default: %(default)s)")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="rows to measure"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The model, a few copies of the clip, and their cached features."""
    from humanomni.tiny import GEOMETRIES, build_checkpoint
    from open_r1 import cache_features

    build_checkpoint(folder / "model", geometry=GEOMETRIES[args.geometry])
    entries = []
    for number in range(args.steps + 3):
        (folder / f"{number}.mp4").write_bytes(EXAMPLE.read_bytes())
        turns = [
            {"from": "human", "value": "<video>\n<audio>\nWhich emotion is the most obvious?"},
            {"from": "gpt", "value": "happy"},
        ]
        entries.append({"video": f"{number}.mp4", "conversations": turns})
    (folder / "list.json").write_text(json.dumps(entries))
    cache = ["--data", str(folder / "list.json"), "--data_folder", str(folder), "--out", str(folder / "cache")]
    cache_features.main(["--model_path", str(folder / "model"), "--dtype", "float32", *cache])


def in_new_process(folder: str, name: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    for option in ("group", "new_tokens", "steps", "geometry"):
        command += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Runs one variant in this process: seconds a step, clips through the towers, tokens, peak memory, floor."""
    from trl import GRPOConfig

    from open_r1.cache_features import FeatureCache
    from open_r1.data import read_samples
    from open_r1.grpo import as_dataset
    from open_r1.trainer.grpo_trainer import Efficiency, HumanOmniGRPOTrainer
    from open_r1.training import ModelArguments, load_for_training

    rates = [machine_rates()]
    folder, chosen = Path(args.folder), VARIANTS[args.worker]
    cached = "feature_cache" in chosen
    efficiency = Efficiency(**{switch: switch in chosen for switch in SWITCHES})
    arguments = ModelArguments(model_path=str(folder / "model"))
    model, processor = load_for_training(arguments, load_towers=not cached)
    trainer = HumanOmniGRPOTrainer(
        model=model,
        reward_funcs=share_of_even_tokens,
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=args.group,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens},
            max_steps=args.steps + 2,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            beta=0.04,
            use_bias_correction_kl=False,
            loss_type="grpo",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32", "load_towers": not (cached or efficiency.encode_once)},
        ),
        train_dataset=as_dataset(read_samples(folder / "list.json")),
        processing_class=processor,
        data_folder=str(folder),
        efficiency=efficiency,
        feature_cache=FeatureCache(folder / "cache", processor, str(folder)) if cached else None,
    )
    tokens = TokenCount()
    for net in (trainer.model, trainer.ref_model):
        net.model.layers[0].register_forward_pre_hook(tokens, with_kwargs=True)
    clock = StepClock(tokens, trainer, efficiency, timed=args.steps)
    trainer.add_callback(clock)
    trainer.efficiency = Efficiency()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates.append(machine_rates())
    return {
        "rows": clock.rows[1:-1],
        "flops": clock.flops.get_total_flops(),
        "loss": logged[1]["loss"],
        "gradient": logged[1]["grad_norm"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "phases": floor_phases(model.config, processor, args, towers=not cached),
        "rate": statistics.median(rate for matrix, _ in rates for rate in matrix),
        "bandwidth": statistics.median(rate for _, reading in rates for rate in reading),
    }


def share_of_even_tokens(completions: list, completion_ids: list[list[int]], **kwargs) -> list[float]:
    """A reward that untrained weights earn, and unevenly."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class TokenCount:
    """Counts the positions that enter the language model's first layer."""

    def __init__(self):
        self.total = 0

    def __call__(self, module, inputs, kwargs):
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        self.total += hidden.shape[0] * hidden.shape[1]


class StepClock(TrainerCallback):
    """Seconds, clips and tokens of each step up to the optimiser, the optimiser's seconds, the last step's FLOPs."""

    def __init__(self, tokens: TokenCount, trainer, efficiency, timed: int):
        """`efficiency` is the trainer's after its first step; after `timed` more, one is counted."""
        self.tokens, self.trainer, self.efficiency, self.timed, self.rows = tokens, trainer, efficiency, timed, []
        aten = torch.ops.aten
        on_a_cpu = {
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
            ),
        }
        self.flops = FlopCounterMode(display=False, custom_mapping=on_a_cpu)

    def now(self) -> tuple:
        return time.perf_counter(), time.process_time(), self.trainer.tower_clips, self.tokens.total

    def counts(self, state) -> bool:
        return state.global_step == 1 + self.timed

    def on_step_begin(self, args, state, control, **kwargs):
        if self.counts(state):
            self.flops.__enter__()
        self.mark = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        names = ("seconds", "cpu", "clips", "tokens")
        self.rows.append({name: new - old for name, new, old in zip(names, self.now(), self.mark, strict=True)})
        if self.counts(state):
            self.flops.__exit__(None, None, None)

    def on_step_end(self, *args, **kwargs):
        self.rows[-1]["optimiser"] = time.perf_counter() - self.mark[0] - self.rows[-1]["seconds"]
        self.trainer.efficiency = self.efficiency


def floor_phases(config, processor, args: argparse.Namespace, towers: bool) -> list[tuple[float, float]]:
    """(FLOPs, bytes) of each phase of a step, matrix products and attention alone; bytes where they may be longer."""
    from open_r1.data import encode_prompt, read_samples

    sample = read_samples(Path(args.folder) / "list.json")[0]
    prompt = len(encode_prompt(processor, sample).input_ids)
    answers = args.group * args.new_tokens
    keys_values = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads  # a token, a layer
    projections = 2 * config.hidden_size**2 + config.hidden_size * keys_values
    weights = config.num_hidden_layers * (projections + 3 * config.hidden_size * config.intermediate_size)
    vocabulary = config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * config.hidden_size  # a query-key pair, scores and values
    prompts = 2 * prompt * weights + attention * prompt**2 / 2 + projector_flops(config)
    seen = prompt + args.new_tokens / 2  # by a new token, on average
    completions = 2 * answers * (weights + vocabulary) + attention * answers * seen
    cache = args.group * seen * config.num_hidden_layers * keys_values
    decoding = (completions, 4 * args.new_tokens * (weights + vocabulary + cache))
    scoring = (prompts + completions, 0)
    backward = (2 * (prompts + completions), 0)
    encoding = [(tower_flops(config), 0)] if towers else []
    return [*encoding, (prompts, 0), decoding, scoring, scoring, backward]  # scored by the reference and the policy


def tower_flops(config) -> float:
    vision, audio = config.vision_config, config.audio_config
    patches = config.patch_grid**2
    layers = range(vision.num_hidden_layers + 1)[config.mm_vision_select_layer]
    a_patch = layers * (2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size))
    sight = config.num_frames * patches * (a_patch + layers * 4 * vision.hidden_size * patches)
    frames = audio.max_source_positions
    a_frame = 2 * (4 * audio.d_model**2 + 2 * audio.d_model * audio.encoder_ffn_dim) + 4 * audio.d_model * frames
    convolutions = 2 * 3 * audio.d_model * (2 * audio.num_mel_bins + audio.d_model)
    return sight + frames * (audio.encoder_layers * a_frame + convolutions)


def projector_flops(config) -> float:
    """The two mixing branches (RegStages at full and half grid, the 3-D convolution, the MLP) and the face branch."""
    width, hidden = config.mm_hidden_size, config.hidden_size
    full, half = config.num_frames * config.patch_grid**2, config.num_frames * config.tokens_per_frame
    block = 2 * hidden**2
    stage1 = full * (2 * width * hidden + hidden**2 + block)  # first block and its shortcut, second block
    branch = stage1 + half * (8 * hidden**2 + 2 * block + 2 * hidden**2)
    face = full * (width * hidden + hidden**2)
    return 2 * (2 * branch + face) + 2 * config.tokens_per_audio * hidden * (config.audio_hidden_size + hidden)


def machine_rates(seconds: float = 2.0) -> tuple[list[float], list[float]]:
    """FLOPs a second of float32 products of the language model's shape, and bytes a second of sums; many of each."""
    left, right, numbers = torch.randn(1024, 896), torch.randn(896, 4864), torch.ones(2**26)
    products = [2 * left.numel() * right.shape[1] / taken for taken in timings(lambda: left @ right, seconds)]
    return products, [numbers.nbytes / taken for taken in timings(numbers.sum, seconds)]


def timings(work: Callable[[], object], seconds: float) -> list[float]:
    """How long `work` takes, again and again for so many seconds."""
    taken, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return taken


COLUMNS = (
    "variant",
    "s/step",
    "times faster",
    "CPU s/step",
    "optimiser s",
    "clips through towers",
    "LM tokens",
    "TFLOP",
    "peak GB",
    "loss",
    "gradient norm",
    "floor s",
    "times floor",
)


def row(name: str, group: list[dict], runs: dict[str, list[dict]]) -> str:
    """A variant's line: medians over its steps, against the first variant's; the floor is at its own rates."""

    def median(of: list[dict], field: str) -> float:
        return statistics.median(step[field] for run in of for step in run["rows"])

    seconds = median(group, "seconds")
    rates = [statistics.median(run[kind] for run in group) for kind in ("rate", "bandwidth")]
    floor = sum(max(flops / rates[0], size / rates[1]) for flops, size in group[0]["phases"])
    step = group[0]["rows"][0]
    cells = (
        name,
        f"{seconds:.2f}",
        f"{median(next(iter(runs.values())), 'seconds') / seconds:.1f}",
        f"{median(group, 'cpu'):.1f}",
        f"{median(group, 'optimiser'):.2f}",
        step["clips"],
        step["tokens"],
        f"{group[0]['flops'] / 1e12:.2f}",
        f"{max(run['peak'] for run in group):.1f}",
        f"{group[0]['loss']:.6f}",
        f"{group[0]['gradient']:.5f}",
        f"{floor:.2f}",
        f"{seconds / floor:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def report(runs: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """The table, in Markdown."""
    done = [run for group in runs.values() for run in group]
    products, reading = ([run[kind] / 1e9 for run in done] for kind in ("rate", "bandwidth"))
    return "\n".join(
        [
            f"{args.geometry} geometry, G = {args.group}, {args.new_tokens} new tokens, {os.cpu_count()} cores, "
            f"float32; matrix products {min(products):.0f} to {max(products):.0f} GFLOP/s, "
            f"reading {min(reading):.0f} to {max(reading):.0f} GB/s",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(row(name, group, runs) for name, group in runs.items()),
        ]
    )


if __name__ == "__main__":
    main()
