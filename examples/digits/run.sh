#!/usr/bin/env bash
# The whole pipeline on handwritten digits: minutes on 2 CPU cores. `make quickstart` calls this.
#
#     examples/digits/run.sh [FOLDER]     everything goes below FOLDER (build/digits); a second call starts afresh
#
# Every stage is an ordinary command of this repository. Only sizes are small: 24 x 24 images, a tiny VAE and SiT, a few
# hundred steps; and --ema-decay, because an average over 10,000 steps says nothing after a few hundred.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-build/digits}
mkdir -p "$out"
: > "$out/seconds.tsv"

# stage NAME COMMAND...: show the command, run it, note its seconds for the report.
stage() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s ==\n$ %s\n' "$name" "$*"
  "$@"
  printf '%s\t%s\n' "$name" "$((SECONDS - start))" >> "$out/seconds.tsv"
}

data=(--data-dir "$out/data" --resolution 24 --num-workers 0)
training=(--output-dir "$out/exps" --batch-size 32 --mixed-precision no --no-compile --report-to none --log-steps 10
  --num-preview 20 --overwrite)
vae_loss=(--loss-cfg-path examples/digits/digits_l1_kl_gan.yaml --vae-learning-rate 1e-3)
sit=(--model SiT-T/2 --encoder-depth 3 --enc-type "timm:local-dir:$out/encoder" --learning-rate 1e-3 --ema-decay 0.98
  --num-classes 10 --eval-samples 200 --eval-reference "$out/data" --eval-features "timm:local-dir:$out/encoder")
repae_steps=400
repae_checkpoint=$(printf '%s/exps/repae/checkpoints/%07d.pt' "$out" "$repae_steps")
samples=(--sample-dir "$out/samples" --num-fid-samples 200 --label-sampling equal --pproc-batch-size 100
  --num-steps 25 --cfg-scale 2 --evaluate "$out/data" --features "timm:local-dir:$out/encoder" --overwrite)

stage images python -m examples.digits.make_images --out "$out/images"
stage preprocessing python preprocessing.py --imagenet-path "$out/images" --output-path "$out/data" --resolution 24 \
  --num-workers 2 --overwrite
stage encoder python -m examples.digits.pretrain_encoder --data-dir "$out/data" --out "$out/encoder"

stage train_vae python train_vae.py --exp-name vae --vae f4d4-tiny "${vae_loss[@]}" --max-train-steps 300 \
  "${data[@]}" "${training[@]}"
stage train_repae python train_repae.py --exp-name repae --vae f4d4-tiny --vae-ckpt "$out/exps/vae/vae.pt" \
  --disc-pretrained-ckpt "$out/exps/vae/vae-discriminator-ckpt.pt" "${vae_loss[@]}" --vae-learning-rate 1e-4 \
  "${sit[@]}" --max-train-steps "$repae_steps" --eval-steps 100 "${data[@]}" "${training[@]}"
stage save_vae_weights python save_vae_weights.py --repae-ckpt "$repae_checkpoint" \
  --vae-name e2e-vae --save-dir "$out/exps" --overwrite
stage cache_latents python cache_latents.py --vae-arch f4d4-tiny --vae-ckpt-path "$out/exps/e2e-vae/e2e-vae.pt" \
  --vae-latents-name e2e-vae --data-dir "$out/data" --output-dir "$out/data" --num-workers 0 --overwrite
stage train_ldm_only python train_ldm_only.py --exp-name ldm --vae f4d4-tiny \
  --vae-ckpt "$out/exps/e2e-vae/e2e-vae.pt" --vae-latents-name e2e-vae "${sit[@]}" --max-train-steps 600 --eval-steps 150 \
  "${data[@]}" "${training[@]}"

stage generate_repae python generate.py --exp-path "$out/exps/repae" "${samples[@]}"
stage generate_ldm python generate.py --exp-path "$out/exps/ldm" "${samples[@]}"
stage reconstruction python evaluate.py --reconstruct --vae-ckpt "$out/exps/vae/vae.pt" "$out/exps/e2e-vae/e2e-vae.pt" \
  --data-dir "$out/data" --features "timm:local-dir:$out/encoder" --no-lpips --output "$out/reconstruction.json"
python -m examples.digits.report --folder "$out"
