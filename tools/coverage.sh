#!/bin/sh
# Print line and branch coverage of csrc by the C tests and the fuzz corpus. What
# a process did that died on purpose is not counted.
set -eu
work=$PWD/build/coverage
rm -rf "$work"
mkdir -p "$work/scratch"
flags="-std=c11 -O0 -g --coverage -DODMA_STORE_HOOK=before_store -Icsrc -Itests/arena/fuzz"
echo 'void before_store(void); void before_store(void) {}' >"$work/hook.c"
${CC:-gcc} $flags -c csrc/odma.c -o "$work/odma.o"
${CC:-gcc} $flags tests/arena/c/test_arena.c "$work/odma.o" -o "$work/facts" -lm -pthread
for fact in $("$work/facts"); do "$work/facts" "$work/scratch" "$fact"; done
for target in batches files; do
    ${CC:-gcc} $flags "tests/arena/fuzz/$target.c" tests/arena/fuzz/driver.c "$work/hook.c" "$work/odma.o" \
        -o "$work/$target" -lm -pthread
    "$work/$target" tests/arena/fuzz/corpus/$target/*.hex >/dev/null
done
gcov -b -o "$work" "$work/odma.o" | awk '
    /^File/ { file = $2; gsub(/\x27/, "", file) }
    /^Lines/ { split($2, a, ":"); lines = a[2] " of " $4 }
    /^Taken/ && file ~ /\.c$/ {
        split($4, a, ":")
        printf "%-22s lines %-17s branches taken %s of %s\n", file, lines, a[2], $6
    }'
rm -f ./*.gcov
