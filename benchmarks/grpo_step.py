"""One full GRPO step (rollout, scoring, backward, optimiser): what each sharing saves, and how far the floor is.

    python benchmarks/grpo_step.py [--geometry medium] [--group 8] [--new_tokens 64] [--steps 2] [--repeats 2]

Each variant runs in a process of its own (peak memory is its own); the variants take turns. The first step of a
process warms up and is left out. The floor is the FLOPs a step cannot avoid (each clip encoded once, each prompt
through the projectors and the language model once a pass, each completion once a pass, backward at twice forward) at
the rate of a plain matrix product, measured in the same process. Weights are untrained, which costs what trained ones
cost.
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
from pathlib import Path

from transformers import TrainerCallback

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
SWITCHES = ("encode_once", "project_once", "prefill_once", "share_prompt_cache", "decode_ahead")
VARIANTS = {
    "all off (as released)": (),
    "encode once": ("encode_once",),
    "project once": ("project_once",),
    "prefill once": ("prefill_once",),
    "share prompt cache (and project once)": ("project_once", "share_prompt_cache"),
    "decode ahead": ("decode_ahead",),
    "all on": SWITCHES,
    "all on, cached features": (*SWITCHES, "feature_cache"),
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
    print(report(runs, args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="medium", help="of humanomni.tiny (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions of the one prompt (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens a completion (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="processes a variant (default: %(default)s)")
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
    for number in range(args.steps + 2):
        (folder / f"{number}.mp4").write_bytes(EXAMPLE.read_bytes())
        turns = [
            {"from": "human", "value": "<video>\n<audio>\nWhich emotion is the most obvious?"},
            {"from": "gpt", "value": "happy"},
        ]
        entries.append({"video": f"{number}.mp4", "conversations": turns})
    (folder / "list.json").write_text(json.dumps(entries))
    cache = ["--data", str(folder / "list.json"), "--data_folder", str(folder), "--out", str(folder / "cache")]
    cache_features.main(["--model_path", str(folder / "model"), *cache])


def in_new_process(folder: str, name: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    for option in ("group", "new_tokens", "steps", "geometry"):
        command += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Runs one variant in this process: seconds a step, clips through the towers, tokens, peak memory, floor."""
    import torch
    from trl import GRPOConfig

    from open_r1.cache_features import FeatureCache
    from open_r1.data import read_samples
    from open_r1.grpo import as_dataset
    from open_r1.rewards import accuracy_reward, format_reward
    from open_r1.trainer.grpo_trainer import Efficiency, HumanOmniGRPOTrainer
    from open_r1.training import ModelArguments, load_for_training

    folder, chosen = Path(args.folder), VARIANTS[args.worker]
    cached = "feature_cache" in chosen
    efficiency = Efficiency(**{switch: switch in chosen for switch in SWITCHES})
    arguments = ModelArguments(model_path=str(folder / "model"))
    model, processor = load_for_training(arguments, load_towers=not cached)
    trainer = HumanOmniGRPOTrainer(
        model=model,
        reward_funcs=[accuracy_reward, format_reward],
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=args.group,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens},
            max_steps=args.steps + 1,
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
    clock = StepClock(tokens, trainer)
    trainer.add_callback(clock)
    trainer.train()
    rows = clock.rows[1:]
    return {
        "seconds": [row["seconds"] for row in rows],
        "cpu": [row["cpu"] for row in rows],
        "clips": rows[-1]["clips"],
        "tokens": rows[-1]["tokens"],
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "flops": floor_flops(model.config, processor, args, towers=not cached),
        "rate": matrix_rate(torch),
    }


class TokenCount:
    """Counts the positions that enter the language model's first layer."""

    def __init__(self):
        self.total = 0

    def __call__(self, module, inputs, kwargs):
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        self.total += hidden.shape[0] * hidden.shape[1]


class StepClock(TrainerCallback):
    """Seconds, clips and tokens of each optimiser step."""

    def __init__(self, tokens: TokenCount, trainer):
        self.tokens, self.trainer, self.rows = tokens, trainer, []
        self.mark = (time.perf_counter(), time.process_time(), 0, 0)

    def on_train_begin(self, *args, **kwargs):
        self.mark = (time.perf_counter(), time.process_time(), self.trainer.tower_clips, self.tokens.total)

    def on_step_end(self, *args, **kwargs):
        now = (time.perf_counter(), time.process_time(), self.trainer.tower_clips, self.tokens.total)
        names = ("seconds", "cpu", "clips", "tokens")
        self.rows.append({name: new - old for name, new, old in zip(names, now, self.mark, strict=True)})
        self.mark = now


def floor_flops(config, processor, args: argparse.Namespace, towers: bool) -> float:
    """Multiply-adds times two that one step cannot avoid, matrix products and attention alone."""
    from open_r1.data import encode_prompt, read_samples

    sample = read_samples(Path(args.folder) / "list.json")[0]
    prompt = len(encode_prompt(processor, sample).input_ids)
    answers = args.group * args.new_tokens
    head = config.hidden_size // config.num_attention_heads
    projections = 2 * config.hidden_size**2 + 2 * config.hidden_size * config.num_key_value_heads * head
    a_token = 2 * config.num_hidden_layers * (projections + 3 * config.hidden_size * config.intermediate_size)
    attention = 4 * config.num_hidden_layers * config.hidden_size  # a query-key pair, scores and values
    pairs = prompt**2 / 2 + answers * (prompt + args.new_tokens / 2)
    language_model = (prompt + answers) * a_token + attention * pairs
    vocabulary = 2 * answers * config.hidden_size * config.vocab_size
    passes = 1 + 1 + 3  # rollout, reference, policy with its backward
    total = passes * (language_model + vocabulary + projector_flops(config))
    return total + (tower_flops(config) if towers else 0)


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


def matrix_rate(torch) -> float:
    """FLOPs a second of a float32 matrix product of the language model's shape, the best of five."""
    left, right = torch.randn(1024, 896), torch.randn(896, 4864)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            left @ right
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * 1024 * 896 * 4864 / best


def report(runs: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """The table, in Markdown; seconds are the median over all measured steps of a variant."""
    rate = max(run["rate"] for group in runs.values() for run in group)
    first = None
    lines = [
        f"{args.geometry} geometry, G = {args.group}, {args.new_tokens} new tokens, {os.cpu_count()} cores, float32; "
        f"matrix rate {rate / 1e9:.0f} GFLOP/s",
        "",
        "| variant | s/step | times faster | CPU s/step | clips through towers | LM tokens | peak GB | loss | "
        "floor s | times floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in runs.items():
        seconds = statistics.median(value for run in group for value in run["seconds"])
        cpu = statistics.median(value for run in group for value in run["cpu"])
        first = first or seconds
        floor = group[0]["flops"] / rate
        peak = max(run["peak"] for run in group)
        lines.append(
            f"| {name} | {seconds:.2f} | {first / seconds:.1f} | {cpu:.1f} | {group[0]['clips']} | "
            f"{group[0]['tokens']} | {peak:.1f} | {group[0]['loss']:.5f} | {floor:.2f} | {seconds / floor:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
