// Products with few rows. A weight matrix is packed in blocks of 64 outputs; within a block, step by step along the
// inputs, 64 neighbours lie side by side, so that a product streams the block once, from its beginning to its end.
// Every output is summed along the inputs in one fixed order, whatever the number of rows: a row's result does not
// depend on the batch it is in.
#pragma once
#include "vector.h"

namespace anabranch {

constexpr int BLOCK = 64;             // outputs of a block
constexpr int QUADS = BLOCK / LANES;  // registers of a block
#ifdef __AVX512F__
constexpr int TILE = 6;  // rows at once: 6 x 4 sums and 4 weights fit 32 registers
#else
constexpr int TILE = 2;
#endif

template <int M>
using Sums = f32x16[M][QUADS];

// fp32: weights[input][64].
struct F32 {
    using Weight = float;
    using Act = float;
    static constexpr int STEP = 1;  // inputs taken at once

    template <int M>
    static void multiply(const float* weights, int inputs, const float* const* rows, Sums<M>& sums) {
        for (int i = 0; i < inputs; ++i, weights += BLOCK) {
            f32x16 w[QUADS];
            for (int j = 0; j < QUADS; ++j) w[j] = load(weights + j * LANES);
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < QUADS; ++j) sums[m][j] += w[j] * rows[m][i];
        }
    }
};

// bf16: weights[input / 2][64][2], products of pairs summed in fp32.
struct BF16 {
    using Weight = bf16;
    using Act = bf16;
    static constexpr int STEP = 2;

    template <int M>
    static void multiply(const bf16* weights, int inputs, const bf16* const* rows, Sums<M>& sums) {
        for (int i = 0; i < inputs; i += 2, weights += 2 * BLOCK) {
#ifdef __AVX512BF16__
            __m512bh w[QUADS];
            for (int j = 0; j < QUADS; ++j)
                w[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + 2 * j * LANES));
            for (int m = 0; m < M; ++m) {
                int32_t pair;
                std::memcpy(&pair, rows[m] + i, sizeof pair);
                const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
                for (int j = 0; j < QUADS; ++j)
                    sums[m][j] = reinterpret_cast<f32x16>(
                        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[m][j]), w[j], x));
            }
#else
            for (int j = 0; j < QUADS; ++j) {
                u32x16 both;
                std::memcpy(&both, weights + 2 * j * LANES, sizeof both);
                const auto even = reinterpret_cast<f32x16>(both << 16);
                const auto odd = reinterpret_cast<f32x16>(both & 0xffff0000u);
                for (int m = 0; m < M; ++m)
                    sums[m][j] += even * widen(rows[m][i]) + odd * widen(rows[m][i + 1]);
            }
#endif
        }
    }
};

// One block of a matrix with `rows`; done(row, sums of its 64 outputs) is called once a row.
template <class Kind, int M, class Done>
inline void tile(const typename Kind::Weight* weights, int inputs, const typename Kind::Act* const* rows,
                 int first, const Done& done) {
    Sums<M> sums = {};
    Kind::template multiply<M>(weights, inputs, rows + first, sums);
    for (int m = 0; m < M; ++m) done(first + m, sums[m]);
}

template <class Kind, class Done>
inline void multiply_block(const typename Kind::Weight* weights, int inputs,
                           const typename Kind::Act* const* rows, int count, const Done& done) {
    for (int first = 0; first < count;) {
        const int left = count - first;
        const int tiles = (left + TILE - 1) / TILE;
        const int take = (left + tiles - 1) / tiles;
        switch (take) {
            case 1: tile<Kind, 1>(weights, inputs, rows, first, done); break;
            case 2: tile<Kind, 2>(weights, inputs, rows, first, done); break;
#ifdef __AVX512F__
            case 3: tile<Kind, 3>(weights, inputs, rows, first, done); break;
            case 4: tile<Kind, 4>(weights, inputs, rows, first, done); break;
            case 5: tile<Kind, 5>(weights, inputs, rows, first, done); break;
            case 6: tile<Kind, 6>(weights, inputs, rows, first, done); break;
#endif
        }
        first += take;
    }
}

}  // namespace anabranch
