/* limits.c - the bucket limits that waste least, exactly.
 *
 * Let W and S be the sums of weight and of weight x length up to a bin. A
 * bucket that ends at bin j and begins after bin i wastes
 *
 *     upper[j] (W[j] - W[i]) - (S[j] - S[i])
 *
 * so the least waste of k buckets up to j is upper[j] W[j] - S[j] plus the
 * minimum over i of the lines (waste of k - 1 buckets up to i) + toll[i] + S[i]
 * - W[i] x at x = upper[j]. Slopes fall with i and x rises with j, so the lower envelope
 * is kept in a queue and each layer takes O(bins).
 */

enum { MOST_BINS = 4096 };

struct line {
    double slope, height;
    uint32_t from;
};

static double at(const struct line *line, double x) { return line->slope * x + line->height; }

/* Whether `b` is nowhere below both `a` and `c`, slopes falling from a to c. */
static bool hidden(const struct line *a, const struct line *b, const struct line *c) {
    return (c->height - a->height) * (a->slope - b->slope) <=
           (b->height - a->height) * (a->slope - c->slope);
}

static void add_line(struct line *queue, uint32_t first, uint32_t *count, struct line line) {
    if (*count > first && queue[*count - 1].slope == line.slope) {
        if (queue[*count - 1].height <= line.height) return;
        (*count)--;
    }
    while (*count >= first + 2 && hidden(&queue[*count - 2], &queue[*count - 1], &line)) (*count)--;
    queue[(*count)++] = line;
}

static bool is_price(double value) { return value >= 0 && value <= 1e300; }

odma_status odma_optimal_limits(const double *weights, const uint32_t *upper, const double *tolls,
                                uint32_t bins, uint32_t limit_count, uint32_t *limits,
                                uint32_t *found, double *waste) {
    if (weights == NULL || upper == NULL || limits == NULL || found == NULL || waste == NULL ||
        bins < 1 || bins > MOST_BINS || limit_count < 1 || limit_count > ODMA_LIMITS)
        return ODMA_INVALID;
    for (uint32_t i = 0; i < bins; i++)
        if (!is_price(weights[i]) || (tolls != NULL && !is_price(tolls[i])) ||
            (i > 0 && upper[i] <= upper[i - 1]))
            return ODMA_INVALID;

    double weight[MOST_BINS + 1], sum[MOST_BINS + 1], least[MOST_BINS + 1];
    uint16_t from[ODMA_LIMITS][MOST_BINS + 1]; /* where the last bucket begins */
    struct line queue[MOST_BINS + 1];
    weight[0] = sum[0] = least[0] = 0;
    for (uint32_t j = 1; j <= bins; j++) {
        weight[j] = weight[j - 1] + weights[j - 1];
        sum[j] = sum[j - 1] + weights[j - 1] * upper[j - 1];
        least[j] = upper[j - 1] * weight[j] - sum[j];
        from[0][j] = 0;
    }
    uint32_t layers = limit_count < bins ? limit_count : bins;
    for (uint32_t k = 1; k < layers; k++) {
        double next[MOST_BINS + 1];
        uint32_t first = 0, count = 0;
        next[0] = 0;
        add_line(queue, first, &count, (struct line){0, 0, 0});
        for (uint32_t j = 1; j <= bins; j++) {
            double x = upper[j - 1];
            while (first + 1 < count && at(&queue[first + 1], x) < at(&queue[first], x)) first++;
            next[j] = x * weight[j] - sum[j] + at(&queue[first], x);
            from[k][j] = (uint16_t)queue[first].from;
            double toll = tolls == NULL ? 0 : tolls[j - 1];
            add_line(queue, first, &count, (struct line){-weight[j], least[j] + toll + sum[j], j});
        }
        for (uint32_t j = 0; j <= bins; j++) least[j] = next[j];
    }

    uint32_t ends[ODMA_LIMITS], count = 0;
    for (uint32_t j = bins, k = layers; j > 0; j = from[k][j]) {
        ends[count++] = j;
        k--;
    }
    for (uint32_t i = 0; i < count; i++) limits[i] = upper[ends[count - 1 - i] - 1];
    *found = count;
    *waste = least[bins] > 0 ? least[bins] : 0;
    return ODMA_OK;
}
