"""A model that learns to reason: pre-training, SFT, GRPO, distillation into half the width, and the report.

    python experiments/reason/run.py                       # what is there is not done again; a killed run goes on
    python experiments/reason/run.py --seeds 0,1,2 --arms all  # three seeds, and what GRPO is compared with
    python experiments/reason/run.py --report              # the report of what has been measured so far

Each stage is a run of its own in RUNS/seed-N, by the TOML file of its kind beside this script. results.json is added
to and never overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import SIZES, make
from page import draw, write_page
from pairs import make_pairs

from leanseek import LLM, SamplingParams, Transformer, load, save
from leanseek.checkpoint import resolve
from leanseek.data.prepare import prepare
from leanseek.posttraining import graders
from leanseek.posttraining.grpo import Chat, grpo
from leanseek.posttraining.grpo_config import GRPORun
from leanseek.posttraining.prompts import Prompt, read_prompts
from leanseek.posttraining.reward_run import RewardRun, train_reward
from leanseek.posttraining.rewards import RewardConfig
from leanseek.posttraining.sampling import SampleConfig, Sampler, pass_at
from leanseek.posttraining.sft import sft
from leanseek.posttraining.sft_config import SFTConfig
from leanseek.reproduce import results
from leanseek.reproduce.worker import commit, machine
from leanseek.server.templates import template_of
from leanseek.training import RunConfig, train
from leanseek.training.metrics import read_rows
from leanseek.writing import replace_file

HERE = Path(__file__).parent
ANSWER = RewardConfig("answer")
THINK = "<think>"
MAIN = ("grpo", "short", "distilled")
ARMS = (*MAIN, "random", "rejection", "student-grpo", "model", "mixture")
STUDENT = (  # half the width
    "model.hidden_size=64", "model.intermediate_size=128", "model.moe_intermediate_size=32",
    "model.q_lora_rank=48", "model.kv_lora_rank=32", "model.initializer_range=0.14", "train.steps=1500",
)  # fmt: skip
DEEPER = 2  # layers that the reward model has more
GREEDY = ("grpo.beta=0.0", "optimizer.lr=1e-4", "train.steps=300")  # GRPO on the reward model: nothing holds it back
# what the reward model is trained on before the pairs, and how
JUDGING = {"columns": ("train.steps=1500",), "thoughts": ("train.steps=1500", "optimizer.lr=2e-3")}
DISTILLATION = ("sft.epochs=10.0", "optimizer.lr=3e-3")  # the student has all of it to learn


def policy(run: GRPORun, **options: Any) -> Any:
    """`grpo` with the chat template of the model's tokenizer."""

    def chat(tokenizer: Any) -> Chat:
        template = template_of(tokenizer, run.model)
        return Chat(template.render, template.stop)

    return grpo(run, chat, **options)


KINDS: dict[str, tuple[type[RunConfig], Callable[..., Any]]] = {
    "pretrain": (RunConfig, train), "sft": (SFTConfig, sft), "grpo": (GRPORun, policy),
    "reward": (RewardRun, train_reward),
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much there is of everything; tests make less."""

    sizes: dict[str, int] = field(default_factory=lambda: SIZES)
    pairs: tuple[int, int] = (48_000, 500)  # to train the reward model on, and held out
    answers: int = 8  # to each problem, for pass@8 and for rejection sampling
    developing: int = 100  # problems of the curve while GRPO runs
    more: dict[str, tuple[str, ...]] = field(default_factory=dict)  # overrides of a kind's settings

    def recipe(self, arm: str) -> str:
        """Names all that decides what is measured of an arm."""
        files, settings = ["data.py", "rewards.py", "pretrain.toml", "sft.toml", "grpo.toml"], dataclasses.asdict(self)
        if arm in ("model", "mixture"):
            files += ["pairs.py", "reward.toml"]
            settings["judge"] = JUDGING, DEEPER, GREEDY
        else:
            del settings["pairs"]
        text = json.dumps([*((HERE / file).read_text() for file in files), settings, STUDENT, DISTILLATION])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Story:
    """All runs of one seed, in a folder of their own."""

    def __init__(self, home: Path, seed: int, scale: Scale):
        self.home, self.seed, self.scale = home, seed, scale
        self.runs, self.data = home / f"seed-{seed}", home / "data"
        self.runs.mkdir(parents=True, exist_ok=True)

    # ---- stages ----

    def trained(self, name: str, kind: str, source: str = "", *more: str) -> Path:
        """The folder of a run, done; `source` is the run it begins with."""
        folder, (config, call) = self.runs / name, KINDS[kind]
        own = [f'name="{name}"', f"train.seed={self.seed}", *self._places(kind), *more, *self.scale.more.get(kind, ())]
        begun = [f'from="{self.runs / source}"'] if source else []
        run = config.load(str(HERE / f"{kind}.toml"), [*own, *begun], self.runs if folder.is_dir() else None)
        done = folder / "done"  # the steps it was asked for; of SFT, epochs say how many they are
        if not done.is_file() or done.read_text() != str(run.train.steps):
            print(f"seed {self.seed}: {name}", flush=True)
            call(run, resume=folder.is_dir(), runs=self.runs)
            replace_file(done, str(run.train.steps).encode())
        return folder

    def _places(self, kind: str) -> list[str]:
        if kind == "pretrain":
            return [f'data.path="{shards(self.home, "pretrain")}"']
        if kind == "grpo":
            return [f'grpo.prompts="{self.data / "rl.jsonl"}"', f'grpo.held_out="{self.data / "curve.jsonl"}"']
        if kind == "reward":
            return [f'data.path="{self.data / "pairs.jsonl"}"', f'reward.held_out="{self.data / "pairs-test.jsonl"}"']
        return []

    def tuned(self, name: str, source: str, rows: Path, *more: str) -> Path:
        return self.trained(name, "sft", source, f'data.path="{rows}"', *more)

    def sampled(self, name: str, model: Path, prompts: Iterable[Prompt], keep: str) -> Path:
        """Verified answers of a run, as rows for SFT; and beside them the summary."""
        out = self.runs / f"{name}.jsonl"
        if not out.is_file():
            print(f"seed {self.seed}: {name}: answers of {model.name}", flush=True)
            llm = LLM(model, packed_copy=False)
            assert llm.tokenizer
            template = template_of(llm.tokenizer, llm.engine.config)
            params = SamplingParams(temperature=1.0, max_tokens=64)
            settings = SampleConfig(n=min(4, self.scale.answers), seed=self.seed, keep=keep)
            with Sampler(llm, [ANSWER], settings, params, template.render) as sampler:
                found = sampler.run(list(prompts), out, str(model))
            replace_file(out.with_suffix(".summary"), json.dumps(found).encode())
        return out

    # ---- arms: the run that each ends with ----

    def arm(self, name: str) -> Path:
        found: Path = getattr(self, name.replace("-", "_"))()
        return found

    def sft(self) -> Path:
        self.trained("pretrain", "pretrain")
        return self.tuned("sft", "pretrain", self.data / "sft.jsonl")

    def grpo(self) -> Path:
        self.sft()
        return self.trained("grpo", "grpo", "sft")

    def random(self) -> Path:
        """GRPO on a coin."""
        self.sft()
        rewards = f'rewards=[{{function="{HERE / "rewards.py"}:coin"}}, {{function="answer", weight=0.0}}]'
        return self.trained("random", "grpo", "sft", rewards)

    def rejection(self) -> Path:
        """SFT on the right ones of the answers that GRPO's prompts got from the model GRPO began with."""
        rows = self.sampled("rejection-rows", self.sft(), read_prompts(self.data / "rl.jsonl"), "all")
        return self.tuned("rejection", "sft", rows)

    def student(self) -> Path:
        """Half the width, and a pre-training in which nobody thinks."""
        return self.trained("student", "pretrain", "", f'data.path="{shards(self.home, "student")}"', *STUDENT)

    def short(self) -> Path:
        """The student, taught answers without thoughts."""
        self.student()
        return self.tuned("short", "student", self.data / "sft-short.jsonl")

    def distilled(self) -> Path:
        """The student, taught the verified answers of the model that GRPO made."""
        rows = self.sampled("distilled-rows", self.grpo(), read_prompts(self.data / "distil.jsonl"), "shortest")
        self.student()
        return self.tuned("distilled", "student", rows, *DISTILLATION)

    def student_grpo(self) -> Path:
        """The student by SFT as the teacher's, then GRPO for as long as the distillation took."""
        taught = seconds(self.distilled())
        asked = json.loads((self.runs / "distilled-rows.summary").read_bytes())["seconds"]
        self.student()
        self.tuned("student-sft", "student", self.data / "sft.jsonl")
        first = 4
        folder = self.trained("student-grpo", "grpo", "student-sft", f"train.steps={first}")
        began = next(r["elapsed_s"] for r in read_rows(folder / "metrics.jsonl") if r["step"] == first and "loss" in r)
        steps = max(first, math.ceil(first * (taught + asked) / began))
        return self.trained("student-grpo", "grpo", "student-sft", f"train.steps={steps}")

    def reward(self) -> Path:
        """First the fine-tuned model says of columns whether they are right, then of those of thoughts; two more layers
        gather what it says of all of them."""
        source = "sft"
        self.sft()
        if not (self.data / "pairs-test.jsonl").is_file():
            make_pairs(self.data, 0, *self.scale.pairs)
        for name, more in JUDGING.items():
            self.trained(name, "pretrain", source, f'data.path="{shards(self.home, name)}"', *more)
            source = name
        deeper(self.runs / source, self.runs / "deeper", DEEPER)
        return self.trained("reward", "reward", "deeper")

    def model(self) -> Path:
        """GRPO on the reward model alone; the rule is logged."""
        rewards = f'{{function="model", arguments={{path="{self.reward()}"}}}}, {{function="answer", weight=0.0}}'
        return self.trained("model", "grpo", "sft", f"rewards=[{rewards}]", *GREEDY)

    def mixture(self) -> Path:
        """GRPO on the reward model and the rule."""
        rewards = f'{{function="model", weight=0.1, arguments={{path="{self.reward()}"}}}}, {{function="answer"}}'
        return self.trained("mixture", "grpo", "sft", f"rewards=[{rewards}]", *GREEDY)

    # ---- what they are worth ----

    def measured(self, name: str) -> dict[str, Any]:
        """A row of results.json: the arm's run on the held-out problems. Kept beside the run."""
        folder = self.arm(name)
        kept = folder / "measured.json"
        if not kept.is_file():
            began = time.monotonic()
            found = examine(folder, read_prompts(self.data / "test.jsonl"), self.scale.answers)
            found |= {"curves": curves(folder), "examined_s": time.monotonic() - began}
            rows = read_rows(folder / "metrics.jsonl")
            row = {
                "arm": name, "seed": self.seed, "fingerprint": self.scale.recipe(name), "measured": found,
                "seconds": seconds(folder), "machine": machine(), "commit": commit(),
                "curve": [[r["step"], r["pass_at_1"]] for r in rows if r.get("pass_at_1") is not None],
                "loss": [[r["step"], r["loss"]] for r in rows if r.get("loss") is not None],
            }  # fmt: skip
            replace_file(kept, json.dumps(row).encode())
        found = json.loads(kept.read_bytes())
        print(f"seed {self.seed}: {name}: {_words(found['measured'])}", flush=True)
        return dict(found)


def deeper(source: Path, out: Path, count: int) -> None:
    """Write a model with more layers, which pass on what they are given: what they add to it begins at zero."""
    if out.is_dir():
        return
    model = load(source)
    grown = Transformer(dataclasses.replace(model.config, num_hidden_layers=model.config.num_hidden_layers + count))
    grown.init_weights(0)
    state = grown.state_dict() | model.state_dict()
    for number in range(model.config.num_hidden_layers, grown.config.num_hidden_layers):
        for last in ("self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"):
            state[f"layers.{number}.{last}"].zero_()
    grown.load_state_dict(state)
    save(grown, out, tokenizer_from=resolve(source))


def _words(found: dict[str, Any]) -> str:
    return (
        f"{found['greedy']:.1%} of held-out problems right, {found['long']:.0%} of answers think, "
        f"pass@{found['k']} {found['pass_at_k']:.1%}"
    )


def seconds(folder: Path) -> float:
    return float(max((r["elapsed_s"] for r in read_rows(folder / "metrics.jsonl") if "elapsed_s" in r), default=0.0))


def examine(folder: Path, prompts: list[Prompt], k: int) -> dict[str, Any]:
    """Greedy answers to held-out problems, and pass@k of k sampled ones at temperature 1."""
    llm = LLM(folder, packed_copy=False)
    assert llm.tokenizer
    template = template_of(llm.tokenizer, llm.engine.config)
    ids = [llm.tokenizer.encode(template.render(p.prompt), add_special_tokens=False) for p in prompts]  # type: ignore[arg-type]
    truths = [prompt.columns["answer"] for prompt in prompts]
    greedy = [o.outputs[0] for o in llm.generate(ids, SamplingParams(temperature=0, max_tokens=64))]
    right = graders.answer([one.text for one in greedy], truths)
    thought = [one.text.startswith(THINK) for one in greedy]
    sampled = llm.generate(ids, SamplingParams(temperature=1.0, max_tokens=64, n=k, seed=0))
    scores = [sum(graders.answer([c.text for c in o.outputs], [t] * k)) for o, t in zip(sampled, truths, strict=True)]
    choices = [c for o in sampled for c in o.outputs]
    return {
        "problems": len(prompts), "greedy": sum(right) / len(right), "k": k,
        "pass_at_k": pass_at(k, [(k, int(s)) for s in scores]), "sampled": sum(scores) / (k * len(scores)),
        "long": sum(thought) / len(thought),
        "sampled_long": sum(c.text.startswith(THINK) for c in choices) / len(choices),
        "right_long": _mean([r for r, t in zip(right, thought, strict=True) if t]),
        "right_short": _mean([r for r, t in zip(right, thought, strict=True) if not t]),
        "length": sum(len(one.token_ids) for one in greedy) / len(greedy),
        "answers": [
            {"prompt": p.prompt[-1]["content"], "answer": o.text, "right": bool(r)}  # type: ignore[index,call-overload]
            for p, o, r in list(zip(prompts, greedy, right, strict=True))[:6]
        ],
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Of a GRPO run, by step: what its rows and completions say."""
    path = folder / "completions.jsonl"
    if not path.is_file():
        return {}
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r.get("loss") is not None]
    names = [n for n in rows[-1] if n.startswith("reward") or n in ("completion_length", "entropy", "no_spread", "kl")]
    names += ["ratio_max", "rollout_tokens_per_second", "train_tokens_per_second"]
    found = {n: [[r["step"], r[n]] for r in rows if r.get(n) is not None] for n in names}
    long: dict[int, list[bool]] = {}
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            long.setdefault(row["step"], []).append(row["completion"].startswith(THINK))
    return found | {"long": [[step, sum(each) / len(each)] for step, each in sorted(long.items())]}


def prepared(texts: Path, home: Path, scale: Scale) -> None:
    """data/, once."""
    data = home / "data"
    if not (data / "curve.jsonl").is_file():
        make(texts, data, 0, scale.sizes)
        lines = (data / "dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        replace_file(data / "curve.jsonl", "".join(lines[: scale.developing]).encode())


def shards(home: Path, name: str) -> Path:
    """Those of a file of texts, made if they are not there."""
    folder = home / ("shards" if name == "pretrain" else f"shards-{name}")
    if not (folder / "manifest.json").is_file():
        prepare([home / "data" / f"{name}.jsonl"], folder, tokenizer=home / "data/tokenizer", workers=1)
    return folder


def check_recipe(home: Path, recipes: dict[str, str]) -> None:
    """Data and runs that another recipe made are not taken for this one's.

    Raises:
        SystemExit: `home` holds such.
    """
    path = home / "recipes.json"
    known = json.loads(path.read_bytes()) if path.is_file() else {}
    if changed := [arm for arm, recipe in recipes.items() if known.get(arm, recipe) != recipe]:
        raise SystemExit(f"{home} holds runs of another recipe of {', '.join(changed)}: move it away, or give --runs")
    replace_file(path, json.dumps(known | recipes).encode())


def tell(texts: Path, home: Path, seeds: Iterable[int], arms: Iterable[str], out: Path, scale: Scale) -> None:
    """Run everything, seed by seed; `out` is the results.json."""
    home.mkdir(parents=True, exist_ok=True)
    recipes = {arm: scale.recipe(arm) for arm in ("sft", *arms)}
    check_recipe(home, recipes)
    prepared(texts, home, scale)
    for seed in seeds:
        story = Story(home, seed, scale)
        for arm, recipe in recipes.items():
            row = story.measured(arm)
            if not any((r.arm, r.seed, r.fingerprint) == (arm, seed, recipe) for r in results.read(out)):
                results.add(out, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path("corpora/shakespeare"), help="a folder of .txt files")
    parser.add_argument("--runs", type=Path, default=Path("runs/reason"))
    parser.add_argument("--seeds", default="0", help="one or more, as 0,1,2")
    parser.add_argument("--arms", default=",".join(MAIN), help=f"all, or some of {','.join(ARMS)}")
    parser.add_argument("--results", type=Path, help="[RUNS/results.json]")
    parser.add_argument("--report", action="store_true", help="only that")
    given = parser.parse_args()
    arms = ARMS if given.arms == "all" else tuple(given.arms.split(","))
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no arm {sorted(unknown)[0]!r}; there are {', '.join(ARMS)}")
    out = given.results or given.runs / "results.json"
    if not given.report:
        tell(given.texts, given.runs, map(int, given.seeds.split(",")), arms, out, Scale())
    rows = [row for row in results.read(out) if row.fingerprint == Scale().recipe(row.arm)]
    write_page(rows, given.runs / "report.html")
    draw(rows, out.with_suffix(".png"))
    print(f"The report: {given.runs / 'report.html'}; a picture: {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
