"""`--dry-run`: the plan of a job, by shapes alone. It reads no weights, and makes no file, folder or process group."""

import json
import sys

import pytest
import torch

import generate
import train_ldm_only
import train_repae
import train_vae
from configs.arguments import repae_parser
from tests.support import sampling, small
from utils.parts import Part

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}
MEMORY = dict(model="SiT-T/2", encoder_depth=4, enc_type="timm:vit_tiny_patch16_224", num_classes=10)


def plan(script, place, output, capsys, **options) -> str:
    """What `--dry-run` prints; no file below the place or the output is touched."""
    before = small.listing(place.folder)
    words = small.OPTIONS[script](place, output, "run", dry_run=1, **options)
    assert SCRIPTS[script].main(words) is None
    assert small.listing(place.folder) == before and not output.exists()
    assert not torch.distributed.is_initialized()
    return capsys.readouterr().out


def number(text: str, line: str) -> float:
    """The first number behind the words that a line begins with."""
    (found,) = [row for row in text.splitlines() if row.startswith(line)]
    return float(found.removeprefix(line).split()[0].replace(",", ""))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_plan_is_printed_and_nothing_is_made(script, place, tmp_path, capsys):
    text = plan(script, place, tmp_path / "exps", capsys)
    assert "4 steps of 8 images (8 on each of 1)" in text and f"{small.COUNT} images" in text
    assert "days on 1 card, by MFU" in text and "trained" in text
    assert ("SiT step" in text) == (script != "train_vae")
    assert ("VAE decode" in text) == (script != "train_ldm_only")
    assert "assumed" not in text  # the data and the latents are there


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_checkpoint_is_as_large_as_the_plan_says(script, place, tmp_path, capsys):
    text = plan(script, place, tmp_path / "exps", capsys)
    SCRIPTS[script].main(small.OPTIONS[script](place, tmp_path / "exps", "run", max_train_steps=1))
    (file,) = (tmp_path / "exps" / "run" / "checkpoints").glob("*.pt")
    assert number(text, "a checkpoint") == pytest.approx(file.stat().st_size / 1e6, rel=0.01)  # MB


def test_the_disk_is_that_of_the_checkpoints_that_stay(place, tmp_path, capsys):
    options = dict(max_train_steps=95, checkpointing_steps=10, checkpoints_total_limit=2)
    for more, said in (({}, "the 2 of 10 that stay, and one more"), ({"keep_every": 40}, "the 4 of 10 that stay")):
        text = plan("train_ldm_only", place, tmp_path / "exps", capsys, **options, **more)
        assert said in text  # 90 and 95; and 40 and 80
        beyond = next(row for row in text.splitlines() if said in row).split("more")[1].split()[0]
        one = number(text, "a checkpoint")
        assert float(beyond.replace(",", "")) == pytest.approx((int(said.split()[1]) + 1) * one, rel=0.02)


def test_neither_data_nor_weights_are_needed_and_what_is_assumed_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = small.argv(exp_name="x", model="SiT-S/2", vae="f16d32", vae_latents_name="none", dry_run=2)
    train_ldm_only.main(words)
    text = capsys.readouterr().out
    assert "note: no data folder data: ImageNet's 1,281,167 images are assumed" in text
    assert "note: no latents data/none.npy: those of --vae are assumed" in text
    assert "note: --vae-ckpt pretrained/e2e-vavae-400k/e2e-vavae-400k.pt is not read" in text
    assert "(128 on each of 2)" in text
    assert number(text, "latents") == pytest.approx(1_281_167 * 64 * 16 * 16 * 4 / 1e9, abs=0.05)
    assert not list(tmp_path.iterdir())


def test_auto_reads_what_is_there_and_nothing_else(place, tmp_path, capsys):
    named = plan("train_repae", place, tmp_path / "exps", capsys)
    found = plan("train_repae", place, tmp_path / "exps", capsys, vae="auto")
    folder = plan("train_repae", place, tmp_path / "exps", capsys, vae="auto", vae_ckpt=place.vae.parent / "diffusers")
    assert found.split("million")[1] == folder.split("million")[1] == named.split("million")[1]
    assert "is not read" in named and "is not read" not in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dry_run=3), "--batch-size: 8 images do not divide by 3 processes"),
        (dict(dry_run=0), "--dry-run: '0' was given"),
        (dict(resolution=32), "--resolution: 32 was given"),
        (dict(vae="auto", vae_ckpt="gone.pt"), "--vae: auto was given, and gone.pt is not there"),
        (dict(encoder_depth=99), "--encoder-depth: 99 was given"),
        (dict(enc_type="None"), "REPA-E needs an encoder"),
        (dict(loss_cfg_path="gone.yaml"), "--loss-cfg-path: gone.yaml cannot be read"),
        (dict(resume=7), "does not exist"),
    ],
)
def test_what_the_run_would_refuse_is_refused(options, words, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        train_repae.main(small.repae_options(place, tmp_path / "exps", "run", **{"dry_run": 1} | options))
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2 and len(lines) == 1 and words in lines[0].replace("argument ", ""), lines
    assert not (tmp_path / "exps").exists()


def test_under_a_launcher_rank_0_alone_speaks(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert plan("train_vae", place, tmp_path / "exps", capsys) == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = small.repae_options(place, tmp_path / "exps", "run")
    assert repae_parser().parse_args([*words, "--dry-run"]).dry_run == 4


def planned(place, tmp_path, **options):
    words = small.repae_options(place, tmp_path / "exps", "run", **options)
    return train_repae.planned(repae_parser().parse_args(words))


def test_processes_share_the_step_and_keep_gradients_in_buckets(place, tmp_path):
    one, two = planned(place, tmp_path), planned(place, tmp_path, dry_run=2)
    assert one.flops == two.flops  # of one image
    trained = 4 * sum(p.numel() for module in two.networks.values() for p in module.parameters() if p.requires_grad)
    assert two.peak["gradients"] == trained > one.peak["gradients"]
    for kind in ("weights", "EMA", "Adam's moments"):
        assert two.peak[kind] == one.peak[kind]


@pytest.mark.parametrize("networks", ["vae", "sit", "vae,sit"])
def test_checkpointed_networks_take_less_memory_and_more_flops(networks, place, tmp_path):
    """In bf16, where norms are float32: what is computed again must come to what was kept."""

    def plan(**options):
        size = dict(vae="f8d4", model="SiT-B/2", resolution=128, data_dir=tmp_path / "none", enc_type="dinov2-vit-b")
        words = small.repae_options(place, tmp_path, "run", mixed_precision="bf16", **size, **options)
        return train_repae.planned(repae_parser().parse_args(words))

    whole, less = plan(), plan(grad_checkpoint=networks)
    assert less.peak.total() < whole.peak.total()
    if networks != "sit":  # the peak is the VAE's
        assert less.peak["activations"] < 0.5 * whole.peak["activations"]
    again = less.flops_per_image / whole.flops_per_image
    assert 1 < again < 1.05 if networks == "sit" else 1.2 < again < 1.35


def test_a_step_of_many_micro_steps(place, tmp_path):
    one, many = planned(place, tmp_path), planned(place, tmp_path, gradient_accumulation_steps=5)
    assert one.flops == many.flops and many.images_per_step == 5 * one.images_per_step
    assert many.total_steps == one.total_steps


def test_backward_is_twice_forward_but_for_what_needs_no_gradient(place, tmp_path):
    flops = planned(place, tmp_path).flops
    decode, sit = ((flops[Part(name)], flops[Part(name, True)]) for name in ("VAE decode", "SiT step"))
    assert decode[1] == 2 * decode[0]
    assert 1.9 * sit[0] < sit[1] < 2 * sit[0]  # noised latents and times are leaves
    # As generator one pass forward and one back to the image; as discriminator two forward, and back to the weights.
    forward, backward = flops[Part("discriminator")], flops[Part("discriminator", True)]
    assert forward * (1 / 3 + 2 / 3) < backward < forward * (1 / 3 + 4 / 3)
    assert Part("SiT align pass", True) in flops and Part("other") not in flops


def real_step(*words: str) -> float:
    """Bytes that a real step takes; the allocator gives every block back at once, or the peak would not show it."""
    eager = small.environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    done = small.run_python("-m", "tests.support.workers.step_memory", *words, env=eager)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is Linux's")
@pytest.mark.parametrize(
    ("vae", "resolution", "batch_size"),
    [("f4d4-tiny", 64, 3), pytest.param("f8d4", 128, 4, marks=pytest.mark.slow)],
)
def test_memory_is_that_of_a_real_step(vae, resolution, batch_size, tmp_path):
    config = small.write_loss_config(tmp_path / "loss.yaml")
    data = dict(resolution=resolution, batch_size=batch_size, data_dir=tmp_path / "data", mixed_precision="no")
    words = small.argv(exp_name="x", output_dir=tmp_path / "exps", vae=vae, loss_cfg_path=config, **data, **MEMORY)
    plan = train_repae.planned(repae_parser().parse_args(words))
    made = sum(plan.peak[kind] for kind in ("activations", "gradients", "autocast copies"))
    assert made == pytest.approx(real_step(*words), rel=0.1)


# generate.py


def sampling_plan(exps, folder, capsys, run="repae", **options) -> str:
    before = small.listing(exps)
    generate.main(sampling.flags(exps, folder, run, dry_run=1, **options))
    assert small.listing(exps) == before
    return capsys.readouterr().out


def test_the_plan_of_a_sampling_job_makes_nothing(exps, tmp_path, capsys):
    text = sampling_plan(exps, tmp_path / "samples", capsys)
    assert "20 samples of 24 px, 3 batches of 8 on 1 process" in text
    assert "3 evaluations of SiT a sample, 3 of them guided" in text and "SiT, conditional" not in text
    assert number(text, str(tmp_path / "samples" / "repae_0000007_cfg1.5-0.0-1.0_steps3_n20.npz")) == pytest.approx(
        20 * 24 * 24 * 3 / 1e6, abs=0.05
    )
    assert not (tmp_path / "samples").exists()


def test_a_sampling_plan_says_what_an_interrupted_job_left(exps, tmp_path, capsys, monkeypatch):
    sampling.interrupt(exps, tmp_path, monkeypatch, after=1)
    before = small.listing(tmp_path)
    text = sampling_plan(exps, tmp_path, capsys)
    assert "8 of its samples are finished" in text and "12 samples of 24 px" in text
    assert small.listing(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(run="plain"), "--cfg-scale"), (dict(guidance_low=1.0), "--guidance-low"), (dict(train_steps=9), "9")],
)
def test_what_a_sampling_job_would_refuse_is_refused(options, words, exps, tmp_path, capsys):
    assert words in sampling.refused(sampling.flags(exps, tmp_path, dry_run=1, **options), capsys, exps, tmp_path)


def test_a_finished_result_is_refused_as_by_the_job(exps, tmp_path, capsys):
    sampling.draw(exps, tmp_path)
    refusal = sampling.refused(sampling.flags(exps, tmp_path, dry_run=1), capsys, tmp_path)
    assert "exists already; --overwrite replaces it" in refusal
