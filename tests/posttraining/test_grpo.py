from leanseek.posttraining.grpo import grpo
from leanseek.training.metrics import read_rows


def test_a(make_run, tmp_path):
    run = make_run()
    grpo(run, runs=tmp_path)
    for r in read_rows(tmp_path / run.name / "metrics.jsonl"):
        print(r)
    print((tmp_path / run.name / "completions.jsonl").read_text()[:1500])
