// Cross-entropy of bilinearly resized scores and its gradient, on CPUs, without the scores in full size.
// Scores are [B, K, h, w], labels [B, H, W]. A task is the target rows that lie between two neighbouring source rows of
// an image. Sums run in a fixed order inside a task and over tasks, so the number of threads does not change the result.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exp.h"

namespace {

// The two source positions of each target position, and the share of the second one.
struct Axis {
    const int32_t *first, *second;
    const float* share;
};

// The target positions of each source position, tap t of position i at t * (source length) + i; unused taps weigh 0.
struct TransposedAxis {
    int64_t taps;
    const int32_t* positions;
    const float* weights;
};

struct Sizes {
    int64_t K, w, W;
};

// Scratch memory of one thread: one target row of K classes, and single numbers of its pixels.
struct Row {
    std::vector<float> tall, high, largest, sum, own, weight;
    explicit Row(Sizes s) : tall(s.K * s.w), high(s.K * s.W), largest(s.W), sum(s.W), own(s.W), weight(s.W) {}
};

// Resizes `row.tall` [K, w] to W columns and leaves exp(score - largest) in `row.high`.
void exponentials(Row& row, const Sizes s, const Axis columns, const int64_t* labels) {
    float *__restrict largest = row.largest.data(), *__restrict sum = row.sum.data();
    for (int64_t x = 0; x < s.W; ++x) largest[x] = -INFINITY;
    for (int64_t k = 0; k < s.K; ++k) {
        const float* tall = row.tall.data() + k * s.w;
        float* __restrict high = row.high.data() + k * s.W;
        for (int64_t x = 0; x < s.W; ++x) {
            const float share = columns.share[x];
            const float score = tall[columns.first[x]] * (1 - share) + tall[columns.second[x]] * share;
            high[x] = score;
            largest[x] = score > largest[x] ? score : largest[x];
        }
    }
    for (int64_t x = 0; x < s.W; ++x) row.own[x] = row.weight[x] != 0 ? row.high[labels[x] * s.W + x] : 0;
    for (int64_t x = 0; x < s.W; ++x) sum[x] = 0;
    for (int64_t k = 0; k < s.K; ++k) {
        float* __restrict high = row.high.data() + k * s.W;
        for (int64_t x = 0; x < s.W; ++x) {
            const float e = exp_nonpositive(high[x] - largest[x]);
            high[x] = e;
            sum[x] += e;
        }
    }
}

// Turns `row.high` into the gradient of the resized scores.
void differentiate(Row& row, const Sizes s, const int64_t* labels) {
    float* __restrict scale = row.sum.data();
    for (int64_t x = 0; x < s.W; ++x) scale[x] = row.weight[x] / scale[x];
    for (int64_t k = 0; k < s.K; ++k) {
        float* __restrict high = row.high.data() + k * s.W;
        for (int64_t x = 0; x < s.W; ++x) high[x] *= scale[x];
    }
    for (int64_t x = 0; x < s.W; ++x)
        if (row.weight[x] != 0) row.high[labels[x] * s.W + x] -= row.weight[x];
}

// Writes the transposed resize of `row.high` to `row.tall`.
void gather_columns(Row& row, const Sizes s, const TransposedAxis columns) {
    for (int64_t k = 0; k < s.K; ++k) {
        const float* high = row.high.data() + k * s.W;
        float* __restrict tall = row.tall.data() + k * s.w;
        for (int64_t x = 0; x < s.w; ++x) tall[x] = 0;
        for (int64_t t = 0; t < columns.taps; ++t) {
            const int32_t* positions = columns.positions + t * s.w;
            const float* weights = columns.weights + t * s.w;
            for (int64_t x = 0; x < s.w; ++x) tall[x] += weights[x] * high[positions[x]];
        }
    }
}

}  // namespace

// Writes `gradient` [B, K, h, w] unless it is null. `below` has the same size: what a task adds to the row below its
// own, which is another task's. `totals` and `counts` are [B, h]. Returns -1, or the first invalid label's position.
extern "C" int64_t cross_entropy(const float* scores, const int64_t* labels, const float* class_weight,
                                 int64_t ignore_index, int64_t B, int64_t K, int64_t h, int64_t w, int64_t H, int64_t W,
                                 const int32_t* row_first, const int32_t* row_second, const float* row_share,
                                 const int32_t* column_first, const int32_t* column_second, const float* column_share,
                                 int64_t taps, const int32_t* tap_positions, const float* tap_weights, float* gradient,
                                 float* below, double* totals, int64_t* counts, int threads) {
    const Sizes s{K, w, W};
    const Axis rows{row_first, row_second, row_share}, columns{column_first, column_second, column_share};
    std::vector<int64_t> begins(h + 1, H);  // target rows of each task
    for (int64_t y = H - 1; y >= 0; --y) begins[rows.first[y]] = y;
    for (int64_t r = h - 1; r >= 0; --r) begins[r] = begins[r] < begins[r + 1] ? begins[r] : begins[r + 1];
    int64_t invalid = B * H * W;
#pragma omp parallel num_threads(threads) reduction(min : invalid)
    {
        Row row(s);
        std::vector<float> d_top(K * w), d_bottom(K * w);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * h; ++task) {
            const int64_t b = task / h, r = task % h;
            std::memset(d_top.data(), 0, K * w * sizeof(float));
            std::memset(d_bottom.data(), 0, K * w * sizeof(float));
            double total = 0;
            int64_t correct = 0;
            for (int64_t y = begins[r]; y < begins[r + 1]; ++y) {
                const float share = rows.share[y];
                const int64_t* own_labels = labels + (b * H + y) * W;
                for (int64_t k = 0; k < K; ++k) {
                    const float* top = scores + ((b * K + k) * h + r) * w;
                    const float* bottom = scores + ((b * K + k) * h + rows.second[y]) * w;
                    for (int64_t x = 0; x < w; ++x) row.tall[k * w + x] = top[x] * (1 - share) + bottom[x] * share;
                }
                for (int64_t x = 0; x < W; ++x) {
                    const int64_t label = own_labels[x];
                    const bool is_class = label >= 0 && label < K && label != ignore_index;
                    row.weight[x] = !is_class ? 0.0f : class_weight ? class_weight[label] : 1.0f;
                    if (!is_class && label != ignore_index && (b * H + y) * W + x < invalid)
                        invalid = (b * H + y) * W + x;
                }
                exponentials(row, s, columns, own_labels);
                for (int64_t x = 0; x < W; ++x) {
                    if (own_labels[x] == ignore_index || own_labels[x] < 0 || own_labels[x] >= K) continue;
                    const float own = row.high[own_labels[x] * W + x];  // exp(0) = 1 at the largest score
                    correct += own >= 1;
                    if (row.weight[x] != 0)
                        total += row.weight[x] * (std::log(row.sum[x]) + row.largest[x] - row.own[x]);
                }
                if (gradient == nullptr) continue;
                differentiate(row, s, own_labels);
                gather_columns(row, s, {taps, tap_positions, tap_weights});
                float* second = rows.second[y] == r ? d_top.data() : d_bottom.data();  // equal at the border
                for (int64_t i = 0; i < K * w; ++i) d_top[i] += row.tall[i] * (1 - share);
                for (int64_t i = 0; i < K * w; ++i) second[i] += row.tall[i] * share;
            }
            totals[task] = total;
            counts[task] = correct;
            if (gradient == nullptr) continue;
            for (int64_t k = 0; k < K; ++k) {
                const int64_t to = ((b * K + k) * h + r) * w;
                std::memcpy(gradient + to, d_top.data() + k * w, w * sizeof(float));
                if (r + 1 < h) std::memcpy(below + to + w, d_bottom.data() + k * w, w * sizeof(float));
            }
        }
        if (gradient != nullptr) {
#pragma omp for schedule(static)
            for (int64_t line = 0; line < B * K * h; ++line)
                if (line % h > 0)
                    for (int64_t i = line * w; i < (line + 1) * w; ++i) gradient[i] += below[i];
        }
    }
    return invalid == B * H * W ? -1 : invalid;
}
