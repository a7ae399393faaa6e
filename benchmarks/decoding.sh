#!/usr/bin/env bash
# Decoding speed of four Pythia sizes with two cache sizes and two batch sizes, on one GPU.
#
#     bash benchmarks/decoding.sh results/decoding [options of `sinklm bench decode`]
#
# A step is compiled for each shape. All shapes are first compiled in parallel, which fills torch's
# compile cache, and then measured one at a time.
set -uo pipefail
output=${1:-results/decoding}
shift
recipes=(pythia-160m pythia-1.4b pythia-2.8b pythia-6.9b)
sizes=(--caches 1+1023,1+4095 --batch-sizes 1,8)

for recipe in "${recipes[@]}"; do
    sinklm bench decode "$recipe" "${sizes[@]}" --num-steps 1 --output "$(mktemp -d)" > /dev/null &
done
wait
for recipe in "${recipes[@]}"; do
    sinklm bench decode "$recipe" "${sizes[@]}" --output "$output/$recipe" "$@"
done
