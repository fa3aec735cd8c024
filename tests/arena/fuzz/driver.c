/* driver.c - runs a fuzz target over files of hex text, without a fuzzer. */
#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

enum { LONGEST = 1 << 16 };

static size_t read_hex(FILE *file, uint8_t *bytes) {
    size_t count = 0;
    unsigned value;
    while (count < LONGEST && fscanf(file, "%2x", &value) == 1) bytes[count++] = (uint8_t)value;
    return count;
}

int main(int argc, char **argv) {
    static uint8_t bytes[LONGEST];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "r");
        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        size_t size = read_hex(file, bytes);
        fclose(file);
        uint8_t *exact = malloc(size + 1); /* so that a read too far is seen */
        if (exact == NULL) return 2;
        for (size_t k = 0; k < size; k++) exact[k] = bytes[k];
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        printf("%s %zu\n", argv[i], size);
    }
    return 0;
}
