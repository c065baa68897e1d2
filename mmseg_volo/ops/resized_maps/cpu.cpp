// Bilinear resize and shift of the products of a convolution, and the transpose of that, on CPUs.
// README.md explains the shape letters. `products` are rows [first, last) of one image, [last - first, w, k, k, O]; the
// dimensions of size k are the shifts of rows and of columns. `map` is one image, [H, W, O].
// Every element of the result is computed by one thread, so the number of threads does not change the result.

#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 16;  // channels that a loop keeps in registers

struct Sizes {
    int64_t first, last, w, H, W, O, k;
};

// Source position and weight of tap t of a target position: index 2 * k * position + t; tap t belongs to shift t / 2.
template <typename T>
struct Taps {
    const int32_t* positions;
    const T* weights;
};

// Target positions and weights of each source position i and shift: elements begins[i * k + shift] to the next begin.
template <typename T>
struct TransposedTaps {
    const int32_t* begins;
    const int32_t* positions;
    const T* weights;
};

// Adds row `y` of the map, BLOCK channels from `channel` on (or the n < BLOCK that are left).
template <typename T, bool FULL>
void spread_row(const T* products, T* map, const Sizes s, int64_t y, int64_t channel, Taps<T> rows, Taps<T> columns,
                T* line) {
    const int64_t n = FULL ? BLOCK : s.O - channel, taps = 2 * s.k;
    const T* sources[6];
    T weights[6];
    int used = 0;
    for (int64_t t = 0; t < taps; ++t) {
        const int64_t i = rows.positions[y * taps + t];
        if (rows.weights[y * taps + t] == 0 || i < s.first || i >= s.last) continue;
        sources[used] = products + ((i - s.first) * s.w * s.k + t / 2) * s.k * s.O + channel;
        weights[used++] = rows.weights[y * taps + t];
    }
    for (int64_t x = 0; x < s.w * s.k; ++x) {  // position and shift of columns
        const int64_t at = (x / s.k * s.k * s.k + x % s.k) * s.O;
        T sum[BLOCK] = {};
        for (int t = 0; t < used; ++t)
            for (int64_t c = 0; c < n; ++c) sum[c] += weights[t] * sources[t][at + c];
        for (int64_t c = 0; c < n; ++c) line[x * BLOCK + c] = sum[c];
    }
    for (int64_t x = 0; x < s.W; ++x) {
        T* to = map + (y * s.W + x) * s.O + channel;
        T sum[BLOCK];
        for (int64_t c = 0; c < n; ++c) sum[c] = to[c];
        for (int64_t t = 0; t < taps; ++t) {
            const T weight = columns.weights[x * taps + t];
            const T* from = line + (columns.positions[x * taps + t] * s.k + t / 2) * BLOCK;
            for (int64_t c = 0; c < n; ++c) sum[c] += weight * from[c];
        }
        for (int64_t c = 0; c < n; ++c) to[c] = sum[c];
    }
}

template <typename T>
void spread(const T* products, T* map, const Sizes s, Taps<T> rows, Taps<T> columns, int threads) {
    std::vector<int64_t> reached;  // rows of the map that depend on these rows of products
    for (int64_t y = 0; y < s.H; ++y)
        for (int64_t t = 2 * s.k * y; t < 2 * s.k * (y + 1); ++t)
            if (rows.weights[t] != 0 && rows.positions[t] >= s.first && rows.positions[t] < s.last) {
                reached.push_back(y);
                break;
            }
    const int64_t count = int64_t(reached.size()), tasks = count * ((s.O + BLOCK - 1) / BLOCK);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> line(s.w * s.k * BLOCK);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t y = reached[task % count], channel = task / count * BLOCK;
            const auto row = s.O - channel >= BLOCK ? spread_row<T, true> : spread_row<T, false>;
            row(products, map, s, y, channel, rows, columns, line.data());
        }
    }
}

// Row i of the products' gradient, BLOCK channels from `channel` on.
template <typename T, bool FULL>
void gather_row(const T* map, T* products, const Sizes s, int64_t i, int64_t channel, TransposedTaps<T> rows,
                TransposedTaps<T> columns, T* line) {
    const int64_t n = FULL ? BLOCK : s.O - channel;
    for (int64_t shift = 0; shift < s.k; ++shift) {
        for (int64_t x = 0; x < s.W; ++x) {
            T sum[BLOCK] = {};
            for (int64_t t = rows.begins[i * s.k + shift]; t < rows.begins[i * s.k + shift + 1]; ++t) {
                const T* from = map + (rows.positions[t] * s.W + x) * s.O + channel;
                for (int64_t c = 0; c < n; ++c) sum[c] += rows.weights[t] * from[c];
            }
            for (int64_t c = 0; c < n; ++c) line[x * BLOCK + c] = sum[c];
        }
        for (int64_t x = 0; x < s.w * s.k; ++x) {
            T sum[BLOCK] = {};
            for (int64_t t = columns.begins[x]; t < columns.begins[x + 1]; ++t) {
                const T* from = line + columns.positions[t] * BLOCK;
                for (int64_t c = 0; c < n; ++c) sum[c] += columns.weights[t] * from[c];
            }
            const int64_t pixel = (i - s.first) * s.w + x / s.k;
            T* to = products + ((pixel * s.k + shift) * s.k + x % s.k) * s.O + channel;
            for (int64_t c = 0; c < n; ++c) to[c] = sum[c];
        }
    }
}

template <typename T>
void gather(const T* map, T* products, const Sizes s, TransposedTaps<T> rows, TransposedTaps<T> columns, int threads) {
    const int64_t count = s.last - s.first, tasks = count * ((s.O + BLOCK - 1) / BLOCK);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> line(s.W * BLOCK);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t i = s.first + task % count, channel = task / count * BLOCK;
            const auto row = s.O - channel >= BLOCK ? gather_row<T, true> : gather_row<T, false>;
            row(map, products, s, i, channel, rows, columns, line.data());
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                             \
    void spread_##NAME(const T* products, T* map, int64_t first, int64_t last, int64_t w, int64_t H, int64_t W,     \
                       int64_t O, int64_t k, const int32_t* rows, const T* row_weights, const int32_t* columns,    \
                       const T* column_weights, int threads) {                                                      \
        spread<T>(products, map, {first, last, w, H, W, O, k}, {rows, row_weights}, {columns, column_weights},      \
                  threads);                                                                                         \
    }                                                                                                               \
    void gather_##NAME(const T* map, T* products, int64_t first, int64_t last, int64_t w, int64_t H, int64_t W,     \
                       int64_t O, int64_t k, const int32_t* row_begins, const int32_t* rows, const T* row_weights,  \
                       const int32_t* column_begins, const int32_t* columns, const T* column_weights,               \
                       int threads) {                                                                               \
        gather<T>(map, products, {first, last, w, H, W, O, k}, {row_begins, rows, row_weights},                     \
                  {column_begins, columns, column_weights}, threads);                                               \
    }

extern "C" {
EXPORT(float, float32)
EXPORT(double, float64)
}
