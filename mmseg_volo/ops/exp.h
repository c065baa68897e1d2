#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// exp(x) for x <= 0, accurate to 2 ulp (Cephes' polynomial). Compilers do not vectorise std::exp. NaN stays NaN.
inline float exp_nonpositive(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = std::nearbyint(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = int32_t((uint32_t(int32_t(n)) + 127u) << 23);
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}
