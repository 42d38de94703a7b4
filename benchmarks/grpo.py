"""Rollouts beside transformers' generate, and steps of GRPO beside TRL's: one small model, the same settings, CPU,
by turns. Prints JSON. In bfloat16, weights are float32 and products BF16: ours as always, TRL's by autocast;
transformers generates with weights in BF16.

    python benchmarks/grpo.py [--python PYTHON_WITH_TRL] [--rounds N] [--dtype float32|bfloat16]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STREAMS, GROUP, NEW, PROMPT_WORDS = 64, 8, 64, 8
MODEL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
WORDS = "one two three four five six seven eight nine ten".split()


def prompts(count: int) -> list[str]:
    return [" ".join(WORDS[(i * 3 + j * j) % 10] for j in range(PROMPT_WORDS)) for i in range(count)]


def share(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: how many of the sampled ids are even."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def make_model(folder: Path) -> None:
    import tokenizers

    from leanseek import ModelConfig, Transformer, checkpoint
    from leanseek.checkpoint.tokenizer import copy_tokenizer

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<eos>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(prompts(40), trainer)
    model = Transformer(ModelConfig(**MODEL)).init_weights(0)
    checkpoint.save(model, folder)
    inner.save(str(folder / "own.json"))
    copy_tokenizer(folder / "own.json", folder, model.config)


def timed(work: Callable[[], int], rounds: int) -> dict[str, float]:
    """work() returns tokens; the best of `rounds` after one that warms up."""
    work()
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - start))
    return {"rollout_tokens_per_second": max(rates)}


def leanseek(folder: Path, rounds: int, dtype: str) -> dict[str, float]:
    import torch

    from leanseek import load
    from leanseek.posttraining.grpo import RolloutFeed
    from leanseek.posttraining.grpo_config import GRPORun
    from leanseek.training.part import Part
    from leanseek.training.trainer import Trainer

    rows = folder.parent / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts(400)))
    torch.manual_seed(0)
    run = GRPORun.from_dict(
        {
            "name": "bench", "from": str(folder), "model": load(folder).config.to_dict(),
            "train": {"batch_size": STREAMS, "dtype": dtype}, "optimizer": {"lr": 1e-6},
            "grpo": {"prompts": str(rows), "group": GROUP, "max_tokens": NEW, "loss": "dr", "cut_off": "keep"},
            "rewards": [{"function": f"{__file__}:share"}],
        }
    )  # fmt: skip
    run_folder = Path(tempfile.mkdtemp(dir=folder.parent))
    feed = RolloutFeed(run, Part(), run_folder, None)
    trainer = Trainer(run, load(folder), objective=feed.objective)
    feed.attach(trainer)
    asked = [ids for _, ids in feed.prompts[:STREAMS]]

    def work() -> int:
        return sum(len(c.token_ids) for (c,) in feed.sampler.complete(asked, 1, NEW, 1.0, range(STREAMS)))

    found = timed(work, rounds)
    seconds = []
    for step in range(rounds + 1):
        start = time.perf_counter()
        trainer.step(feed.batch(step), step)
        seconds.append(time.perf_counter() - start)
        assert trainer.objective.figures()["mismatch"] == 0
    feed.rewards.close()
    return found | {"step_seconds": statistics.median(seconds[1:])}


def transformers(folder: Path, rounds: int, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>")
    tokenizer.pad_token = "<eos>"
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    inputs = tokenizer(prompts(STREAMS), return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def work() -> int:
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=NEW, pad_token_id=0)
        return int((out[:, inputs["input_ids"].shape[1] :] != 0).sum())

    return timed(work, rounds)


def trl(folder: Path, rounds: int, dtype: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>")
    tokenizer.pad_token = "<eos>"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder.parent), per_device_train_batch_size=STREAMS, num_generations=GROUP,
        max_completion_length=NEW, learning_rate=1e-6, beta=0.0, loss_type="dr_grpo", scale_rewards="none",
        max_steps=rounds + 1, use_cpu=True, bf16=dtype == "bfloat16",
        report_to="none", logging_strategy="no", save_strategy="no",
        temperature=1.0, top_k=0, gradient_checkpointing=False,
    )  # fmt: skip
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    GRPOTrainer(
        model=model, reward_funcs=share, args=settings, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts(400)]),
    ).train()  # fmt: skip
    return {"step_seconds": statistics.median(seconds[1:])}


WORKERS = {"leanseek": leanseek, "transformers": transformers, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="a Python with trl, transformers and datasets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker
        print(json.dumps(WORKERS[name](Path(folder), options.rounds, options.dtype)))
        return
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "model"
        make_model(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
        for _ in range(2):
            for name, python in (
                ("leanseek", sys.executable),
                ("transformers", options.python),
                ("trl", options.python),
            ):
                command = [python, __file__, "--worker", name, str(folder), "--rounds", str(options.rounds)]
                command += ["--dtype", options.dtype]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    best = {
        name: {key: (max if "second" in key and "tokens" in key else min)(r[key] for r in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    ours = best["leanseek"]
    faster = {
        "rollout": ours["rollout_tokens_per_second"] / best["transformers"]["rollout_tokens_per_second"],
        "step": best["trl"]["step_seconds"] / ours["step_seconds"],
    }
    print(json.dumps({"results": best, "faster": faster}, indent=1))


if __name__ == "__main__":
    main()
