// Outlook attention for window 3, stride 2 on CPUs: softmax, weighted sum and fold in one pass over the tokens.
// The unfolded windows are never stored. cpu.py compiles this file once per head width (-DHEAD_WIDTH=32).
// README.md explains the shape letters. A window reads from position v and writes to position u; u = 3 * a + b.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exp.h"

namespace {

constexpr int64_t D = HEAD_WIDTH, K = 9;

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bfloat16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to nearest even, but keep a NaN: rounding could turn it into infinity.
    to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Sizes {
    int64_t B, H, W, N;
    float scale;
    int64_t h() const { return (H + 1) / 2; }
    int64_t w() const { return (W + 1) / 2; }
    int64_t C() const { return N * D; }
};

// Softmax of `count` consecutive rows u of every head. The result is transposed, weights[v * N * count + row], so that
// loops over rows read consecutive addresses.
template <class T>
void softmax_rows(const T* logits, float* __restrict weights, int64_t N, int64_t count, float scale) {
    const int64_t rows = N * count;
    for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < count; ++c)
            for (int64_t v = 0; v < K; ++v)
                weights[v * rows + n * count + c] = load(logits[n * K * K + c * K + v]) * scale;
#pragma GCC ivdep
    for (int64_t r = 0; r < rows; ++r) {
        float largest = weights[r];
        for (int64_t v = 1; v < K; ++v) largest = weights[v * rows + r] > largest ? weights[v * rows + r] : largest;
        float sum = 0;
        for (int64_t v = 0; v < K; ++v) {
            const float e = exp_nonpositive(weights[v * rows + r] - largest);
            weights[v * rows + r] = e;
            sum += e;
        }
        const float inverse = 1.0f / sum;
        for (int64_t v = 0; v < K; ++v) weights[v * rows + r] *= inverse;
    }
}

// One task is one row of output tokens. Each softmax row (window, u) contributes to one token, so no work is repeated.
template <class T>
void forward(const T* value, const T* logits, T* out, const Sizes s, int threads) {
    const int64_t H = s.H, W = s.W, h = s.h(), w = s.w(), N = s.N, C = s.C(), rows = 3 * N;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(K * rows), line((2 * w + 1) * C);  // token x has index x + 1
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.B * H; ++task) {
            const int64_t b = task / H, y = task % H;
            std::memset(line.data(), 0, line.size() * sizeof(float));
            for (int64_t i = y / 2; i <= (y + 1) / 2 && i < h; ++i) {
                const int64_t a = y - 2 * i + 1;  // this row's position in window row i
                for (int64_t j = 0; j < w; ++j) {
                    softmax_rows(logits + (((b * h + i) * w + j) * N * 3 + a) * 27, weights.data(), N, 3, s.scale);
                    for (int64_t n = 0; n < N; ++n) {
                        float left[D] = {}, centre[D] = {}, right[D] = {};
                        for (int64_t v = 0; v < K; ++v) {
                            const int64_t vy = 2 * i - 1 + v / 3, vx = 2 * j - 1 + v % 3;
                            if (vy < 0 || vy >= H || vx < 0 || vx >= W) continue;
                            const T* __restrict from = value + ((b * H + vy) * W + vx) * C + n * D;
                            const float* p = weights.data() + v * rows + n * 3;
                            const float p0 = p[0], p1 = p[1], p2 = p[2];
#pragma GCC ivdep
                            for (int64_t d = 0; d < D; ++d) {
                                const float x = load(from[d]);
                                left[d] += p0 * x;
                                centre[d] += p1 * x;
                                right[d] += p2 * x;
                            }
                        }
                        float* __restrict to = line.data() + 2 * j * C + n * D;
#pragma GCC ivdep
                        for (int64_t d = 0; d < D; ++d) to[d] += left[d];
#pragma GCC ivdep
                        for (int64_t d = 0; d < D; ++d) to[C + d] += centre[d];
#pragma GCC ivdep
                        for (int64_t d = 0; d < D; ++d) to[2 * C + d] += right[d];
                    }
                }
            }
            T* __restrict to = out + (b * H + y) * W * C;
            const float* __restrict from = line.data() + C;
#pragma GCC ivdep
            for (int64_t x = 0; x < W * C; ++x) store(to + x, from[x]);
        }
    }
}

// Gradient of the logits of one window. The window's part of the gradient of value is added to `sums`.
template <class T>
void backward_window(const T* value, const T* logits, const T* grad, float* sums, T* dlogits, const Sizes& s,
                     int64_t b, int64_t i, int64_t j, float* weights) {
    const int64_t H = s.H, W = s.W, N = s.N, C = s.C(), rows = K * N;
    softmax_rows(logits, weights, N, K, s.scale);
    int64_t token[K];
    for (int64_t v = 0; v < K; ++v) {
        const int64_t y = 2 * i - 1 + v / 3, x = 2 * j - 1 + v % 3;
        token[v] = y < 0 || y >= H || x < 0 || x >= W ? -1 : ((b * H + y) * W + x) * C;
    }
    for (int64_t n = 0; n < N; ++n) {
        float g[K][D], dweights[K][K];  // [u][d], [u][v]
        for (int64_t u = 0; u < K; ++u)
#pragma GCC ivdep
            for (int64_t d = 0; d < D; ++d) g[u][d] = token[u] < 0 ? 0.0f : load(grad[token[u] + n * D + d]);
        for (int64_t v = 0; v < K; ++v) {
            if (token[v] < 0) {
                for (int64_t u = 0; u < K; ++u) dweights[u][v] = 0;
                continue;
            }
            const T* from = value + token[v] + n * D;
            float x[D], sum[D] = {};
#pragma GCC ivdep
            for (int64_t d = 0; d < D; ++d) x[d] = load(from[d]);
            for (int64_t u = 0; u < K; ++u) {
                const float p = weights[v * rows + n * K + u];
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; ++d) {
                    sum[d] += p * g[u][d];
                    dot += x[d] * g[u][d];
                }
                dweights[u][v] = dot;
            }
            float* __restrict to = sums + token[v] + n * D;
#pragma GCC ivdep
            for (int64_t d = 0; d < D; ++d) to[d] += sum[d];
        }
        for (int64_t u = 0; u < K; ++u) {
            float mean = 0;
            for (int64_t v = 0; v < K; ++v) mean += weights[v * rows + n * K + u] * dweights[u][v];
            for (int64_t v = 0; v < K; ++v)
                store(dlogits + n * K * K + u * K + v,
                      weights[v * rows + n * K + u] * (dweights[u][v] - mean) * s.scale);
        }
    }
}

// Even window rows come first, then odd ones. Rows of equal parity share no tokens, so the order of the additions does
// not depend on the number of threads. `sums` is the gradient of value in float32; the first window row that reaches an
// element sets it to zero.
template <class T>
void backward(const T* value, const T* logits, const T* grad, float* sums, T* dlogits, const Sizes s, int threads) {
    const int64_t H = s.H, h = s.h(), w = s.w(), line = s.W * s.C(), window = s.N * K * K;
    for (int64_t phase = 0; phase < 2; ++phase) {
        const int64_t count = (h - phase + 1) / 2;
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> weights(K * K * s.N);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < s.B * count; ++task) {
                const int64_t b = task / count, i = 2 * (task % count) + phase;
                // An even row is the first to reach rows 2i - 1 to 2i + 1; for odd rows the even neighbours came first.
                for (int64_t y = 2 * i - 1; y <= 2 * i + 1; ++y) {
                    const bool first = phase == 0 || y == 2 * i || (y == 2 * i + 1 && i + 1 == h);
                    if (first && y >= 0 && y < H) std::memset(sums + (b * H + y) * line, 0, line * sizeof(float));
                }
                for (int64_t j = 0; j < w; ++j) {
                    const int64_t at = ((b * h + i) * w + j) * window;
                    backward_window(value, logits + at, grad, sums, dlogits + at, s, b, i, j, weights.data());
                }
            }
        }
    }
}

}  // namespace

extern "C" {

#define EXPORT(NAME, T)                                                                                               \
    void forward_##NAME(const T* value, const T* logits, T* out, int64_t B, int64_t H, int64_t W, int64_t N,          \
                        float scale, int threads) {                                                                   \
        forward(value, logits, out, Sizes{B, H, W, N, scale}, threads);                                               \
    }                                                                                                                 \
    void backward_##NAME(const T* value, const T* logits, const T* grad, float* sums, T* dlogits, int64_t B,          \
                         int64_t H, int64_t W, int64_t N, float scale, int threads) {                                 \
        backward(value, logits, grad, sums, dlogits, Sizes{B, H, W, N, scale}, threads);                              \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
}
