// What becomes of a head's query or key before it attends: its norm, and its rotation by the position.
#pragma once
#include <cmath>

#include "vector.h"

namespace anabranch {

inline float inverse_rms(const float* x, int n, float eps) {
    f32x16 squares{};
    for (int d = 0; d < n; d += LANES) squares += load(x + d) * load(x + d);
    return 1.0f / std::sqrt(sum(squares) / n + eps);
}

inline void scale_by(float* x, const float* weight, float scale, int n) {
    for (int d = 0; d < n; ++d) x[d] = x[d] * scale * weight[d];
}

// The first and second `half` of the rotary dimensions are the two parts of each rotated pair.
inline void rotate(float* x, const float* cosine, const float* sine, int half) {
    for (int d = 0; d < half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a * cosine[d] - b * sine[d];
        x[d + half] = b * cosine[d] + a * sine[d];
    }
}

}  // namespace anabranch
