"""The benchmark of evaluation runs, and every row has its rate."""

import json

import pytest

from benchmarks import evaluate


@pytest.mark.slow
def test_every_case_runs(tmp_path):
    evaluate.main(f"--device cpu --batch-size 2 --repeats 1 --threads 1 --output {tmp_path}".split())
    (file,) = tmp_path.glob("evaluate-*.json")
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    assert all(row["images_per_second"] > 0 and row["peak_gib"] > 0 for row in rows.values())

    # A network's share is its FLOPs over its seconds over the peak: equal FLOPs make it go with the rate.
    ours, published = rows["Inception in use"], rows["Inception as published"]
    ratio = ours["images_per_core_second"] / published["images_per_core_second"]
    assert ours["share_of_matmul"] / published["share_of_matmul"] == pytest.approx(ratio, rel=0.01)
