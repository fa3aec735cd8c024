#!/bin/sh
# Fuzz for SECONDS each: batches and files of the arena, prompts. Needs clang with
# libFuzzer (Debian: clang and libclang-rt-dev).
set -eu
seconds=$1
clang=$(command -v clang || ls /usr/bin/clang-[0-9]* 2>/dev/null | tail -n 1 || true)
if [ -z "$clang" ]; then
    echo "fuzz: clang is needed; on Debian: apt-get install clang libclang-rt-dev" >&2
    exit 2
fi
for target in batches features files; do
    work=build/fuzz/$target
    mkdir -p "$work/corpus"
    "$clang" -std=c11 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        -Icsrc -Itests/arena/fuzz "tests/arena/fuzz/$target.c" csrc/odma.c -o "$work/fuzz" -lm -pthread
    for hex in tests/arena/fuzz/corpus/"$target"/*.hex; do
        python3 -c 'import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read()))' \
            <"$hex" >"$work/corpus/$(basename "$hex" .hex)"
    done
    "$work/fuzz" -max_total_time="$seconds" -max_len=2000 -len_control=0 -timeout=30 \
        -artifact_prefix="$work/" "$work/corpus"
done
